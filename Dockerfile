# What `launch gke` and `launch queued` run:
#   docker build --build-arg COMMIT="$(git rev-parse --short=12 HEAD)" -t IMAGE .
# EXTRA is tpu or cuda; BASE any image with Python 3.11 or 3.12 and pip.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRA=tpu
ARG COMMIT=unknown
ENV TREE_FFN_COMMIT=${COMMIT} PYTHONUNBUFFERED=1
WORKDIR /tree_ffn
COPY pyproject.toml constraints-*.txt README.md LICENSE ./
COPY tree_ffn tree_ffn
COPY experiments experiments
COPY configs configs
RUN python -m pip install --no-cache-dir -c "constraints-$(python -c 'import sys; print("3.11" if sys.version_info < (3, 12) else "3.12")').txt" ".[train,data,gcs,${EXTRA}]"
