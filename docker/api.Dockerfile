# The API alone: no engine, no libtorch. Build from the repository's root:
#
#   docker build -f docker/api.Dockerfile -t promptweave-api .

FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /src
COPY . .
# .sqlx answers query! at build time: no database is needed here.
RUN cargo build --release --locked --no-default-features

FROM debian:bookworm-20250520-slim
RUN useradd --system --uid 10001 --user-group --home-dir /var/lib/promptweave --no-log-init promptweave \
    && install -d -o promptweave -g promptweave /var/lib/promptweave
COPY --from=build /src/target/release/promptweave /usr/local/bin/
USER 10001:10001
VOLUME /var/lib/promptweave
ENV PROMPTWEAVE_DATA_DIR=/var/lib/promptweave PROMPTWEAVE_LOG_FORMAT=json
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=6s --start-period=20s CMD ["promptweave", "healthcheck"]
ENTRYPOINT ["promptweave"]
CMD ["serve"]
