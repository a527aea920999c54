# A server of MMSER on a processor:  docker build -t mmser .  &&  docker run --rm -p 8000:8000 mmser
# Another model:  docker run --rm -p 8000:8000 -v "$PWD/runs/mine:/model:ro" mmser --checkpoint /model
FROM python:3.11-slim

# PyPI's torch for Linux brings the libraries of CUDA, some gigabytes; this index has the one for processors
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX="https://download.pytorch.org/whl/cpu"
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$TORCH"

COPY setup.cfg pyproject.toml README.md LICENSE /build/
COPY *.py /build/
COPY mmser /build/mmser
COPY checkpoints /build/checkpoints
RUN pip install --no-cache-dir "/build[serve]" && rm -r /build

RUN useradd --create-home --uid 10001 mmser
USER mmser
WORKDIR /home/mmser
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["mmser", "serve", "--host", "0.0.0.0"]
