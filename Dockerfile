# evenlight as a program, on the CPU or a GPU: built from package registries alone, no model hub.
FROM python:3.11-slim-bookworm

# OpenCV's wheel expects these of the system.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 libxcb1 \
    && rm -rf /var/lib/apt/lists/*

# An index with CPU wheels of torch, to leave CUDA out.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[heic,s3,serve]' \
    && useradd --create-home --uid 1000 evenlight

USER 1000
WORKDIR /photos
ENTRYPOINT ["evenlight"]
