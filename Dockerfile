# For a machine with an NVIDIA GPU, its driver and the NVIDIA Container Toolkit:
#   docker build -t pdf2lora .
#   docker run --rm --gpus all -v "$PWD":/pdf2lora pdf2lora              # dvc repro in this checkout
#   docker run --rm --gpus all -v "$PWD":/pdf2lora pdf2lora python -m commands.doctor
# The CUDA libraries come with torch. Triton needs a C compiler when it loads its kernels.
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends gcc git libc6-dev && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility PIP_NO_CACHE_DIR=1
COPY requirements.txt requirements.lock /tmp/
RUN pip install "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' /tmp/requirements.txt)" \
 && pip install --no-deps --require-hashes -r /tmp/requirements.lock
RUN git config --system --add safe.directory /pdf2lora
WORKDIR /pdf2lora
CMD ["dvc", "repro"]
