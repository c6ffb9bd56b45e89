# ghn-service with its bundled checkpoint:
#   docker build -t ghn-service . && docker run -p 127.0.0.1:50051:50051 ghn-service
# On GPUs:
#   docker build -t ghn-service:cuda --build-arg DEVICE=cuda --build-arg TORCH_INDEX_URL= .
#   docker run --gpus all -p 127.0.0.1:50051:50051 ghn-service:cuda
#
# Build arguments:
#   DEVICE           device that predicts: cpu or cuda
#   TORCH_INDEX_URL  extra package index to take torch from: PyTorch's own CPU builds, which make the image several
#                    gigabytes smaller; if empty pip's index, which has builds for CUDA
#   EXTRAS           extras of the package to install, such as tracing
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG EXTRAS=""
WORKDIR /build
RUN python -m venv /opt/ghn
ENV PATH=/opt/ghn/bin:$PATH
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY clients ./clients
COPY architectures ./architectures
COPY ghn_service ./ghn_service
RUN pip install --no-cache-dir -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:3.11-slim-bookworm
ARG DEVICE=cpu
RUN useradd --system --create-home --uid 10001 ghn
COPY --from=build /opt/ghn /opt/ghn
ENV PATH=/opt/ghn/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MALLOC_ARENA_MAX=2 \
    GHN_HOST=0.0.0.0 \
    GHN_PORT=50051 \
    GHN_HEALTH_PORT=50052 \
    GHN_DEVICE=${DEVICE} \
    GHN_LOG_FORMAT=json
USER 10001
WORKDIR /home/ghn
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 \
    CMD ["ghn-client", "health", "--address", "localhost:50052"]
ENTRYPOINT ["ghn-server"]
CMD ["serve"]
