# A worker: torch, and the compiler that torch.compile calls.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 TRAINMASTER_HOME=/data HF_HOME=/data/huggingface
CMD ["trainmaster", "worker"]

RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends gcc g++ >/dev/null \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 trainmaster
WORKDIR /app

# cpu: the CPU build where an index has it (TORCH_INDEX names one more); cuda: the default build
ARG TORCH_BUILD=cpu
ARG TORCH_INDEX=
COPY pyproject.toml constraints.txt setup.sh ./
RUN mkdir gptcore worker api trainmaster \
 && touch README.md LICENSE gptcore/__init__.py worker/__init__.py api/__init__.py trainmaster/__init__.py \
 && EXTRAS=worker,train,eval ./setup.sh

COPY . .
# the running container cannot write here
RUN python -m compileall -q gptcore worker api trainmaster \
 && install -d -m 700 -o trainmaster -g trainmaster /data
USER trainmaster
# compilers and libraries keep caches in the home directory
ENV HOME=/tmp
