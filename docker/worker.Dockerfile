# A worker: the same program with the engine. Build from the repository's root:
#
#   docker build -f docker/worker.Dockerfile -t promptweave-worker .
#   docker build -f docker/worker.Dockerfile -t promptweave-worker:cuda --build-arg ACCELERATOR=cuda .
#
# One binary serves both: it is linked against libtorch for the CPU, and a worker that finds libtorch_cuda.so beside
# libtorch_cpu.so loads it. So the two images differ in their libraries alone.
ARG ACCELERATOR=cpu

FROM rust:1.95.0-slim-bookworm AS build
# hadolint ignore=DL3008 # Debian keeps only the newest version of a package; the base image's date pins the rest
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3 python3-pip unzip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# First what changes least: the download stays in its layer when only the code changes.
COPY scripts/setup.sh scripts/
RUN scripts/setup.sh libtorch && mkdir /opt/libtorch && cp -RL .libtorch/. /opt/libtorch/
COPY . .
# Where the binary finds libtorch at run time is what it was linked with.
ENV LIBTORCH=/opt/libtorch/torch
RUN cargo build --release --locked && rm -r /opt/libtorch/torch/include

FROM build AS libraries-cpu

FROM build AS libraries-cuda
# All of PyTorch's libraries and NVIDIA's, about 4 GB; the Python around them is left behind.
RUN python3 -m pip install --quiet --target /opt/cuda --no-cache-dir --no-compile --only-binary=:all: torch==2.11.0 \
    && rm -r /opt/libtorch && mkdir -p /opt/libtorch/torch && mv /opt/cuda/torch/lib /opt/libtorch/torch/ \
    && mv /opt/cuda/nvidia /opt/libtorch/ && rm -r /opt/cuda

# hadolint ignore=DL3006 # one of the two stages above
FROM libraries-${ACCELERATOR} AS libraries

FROM debian:bookworm-20250520-slim
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libstdc++6 && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --home-dir /var/lib/promptweave --no-log-init promptweave \
    && install -d -o promptweave -g promptweave /var/lib/promptweave
COPY --from=libraries /opt/libtorch /opt/libtorch
COPY --from=build /src/target/release/promptweave /usr/local/bin/
USER 10001:10001
VOLUME /var/lib/promptweave
ENV PROMPTWEAVE_DATA_DIR=/var/lib/promptweave PROMPTWEAVE_LOG_FORMAT=json
# A worker answers no requests: it ends when it cannot go on, and its lease runs out when it hangs. Whether workers
# are well is asked of the API, at /readyz/workers.
HEALTHCHECK NONE
ENTRYPOINT ["promptweave"]
CMD ["worker"]
