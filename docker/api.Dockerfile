# The API: no torch, no compiler.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 TRAINMASTER_HOME=/data
EXPOSE 8000
# without a key it would not listen beyond loopback: the first start makes one
CMD ["trainmaster", "api", "--host", "0.0.0.0", "--port", "8000", "--first-key", "/data/api-key"]

RUN useradd --uid 1000 trainmaster
WORKDIR /app

# dependencies first: a change of the source does not install them again
COPY pyproject.toml constraints.txt setup.sh ./
RUN mkdir gptcore worker api trainmaster \
 && touch README.md LICENSE gptcore/__init__.py worker/__init__.py api/__init__.py trainmaster/__init__.py \
 && EXTRAS=api ./setup.sh

COPY . .
# the running container cannot write here
RUN python -m compileall -q gptcore worker api trainmaster \
 && install -d -m 700 -o trainmaster -g trainmaster /data
USER trainmaster
# there is no other writable folder for caches
ENV HOME=/tmp
