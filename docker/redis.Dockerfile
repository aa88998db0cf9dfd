# Redis with a password of its own, which its first start makes and the API and the workers read.
ARG REDIS_IMAGE=redis:7-bookworm
FROM ${REDIS_IMAGE}

# the official image's user; new volumes take the owner of these folders
RUN install -d -o 999 -g 999 /data /password
COPY docker/redis-start /usr/local/bin/
USER 999:999
WORKDIR /data
ENTRYPOINT []
CMD ["redis-start"]
