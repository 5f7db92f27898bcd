# The project for compose.yaml: MLflow, the live service and the loop run from this one image.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /abnloop
COPY . .
RUN make .venv/installed
ENV PATH=/abnloop/.venv/bin:$PATH PYTHONPATH=/abnloop
# The workspace belongs to whoever made it, on the host.
RUN git config --system --add safe.directory '*'
