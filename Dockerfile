# The images of ntm-serving, one stage each:
#
#   gateway            ntm-serve for models on TensorFlow Serving; holds nothing of TensorFlow but its messages
#   gateway-embedded   ntm-serve that runs the models itself
#   model-server       ntm-model-server, a stand-in for TensorFlow Serving
#   trainer            trains and exports, on CPU or an NVIDIA GPU
#
#   docker build --target gateway --tag ntm-serving/gateway:0.1.0 .
#
# All of them run as user 65532, write nothing outside of mounted volumes and /tmp, and carry no package installer.
# docs/deployment.md says how they are tested.

# The tag is for people, the digest is what counts. Renew both together.
ARG BASE=docker.io/library/debian:bookworm-20260918-slim@sha256:3783cc01769c7b2b1b83a5c5ad96c815348e28ed7da68e2e3687004faa906251

# ---- what every image stands on: the interpreter -------------------------------------------------------------------
FROM ${BASE} AS python
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/*
ENV PATH=/opt/ntm/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# ---- what builds: stays behind --------------------------------------------------------------------------------------
FROM python AS build
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates python3-venv \
 && rm -rf /var/lib/apt/lists/*
# One environment has the installer, the other one is what gets installed: no pip in it.
RUN python3 -m venv /opt/pip \
 && python3 -m venv --without-pip /opt/ntm
# From here on every command may use it: INSTALL PACKAGE...
ENV INSTALL="/opt/pip/bin/pip --python /opt/ntm/bin/python install --no-cache-dir --constraint /src/constraints.txt"
WORKDIR /src
COPY pyproject.toml constraints.txt LICENSE ./
# Stands in for the sources: what they depend on is installed before they are copied, and again only when that changes.
RUN mkdir -p ntm service training protos/ntm_serving && touch README.md

FROM build AS wheel
COPY README.md ./
COPY protos protos
COPY ntm ntm
COPY training training
COPY service service
RUN /opt/pip/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# TensorFlow's generated messages, which tensorflow-serving-api's need, out of its wheel: 1 MB of 2 GB.
FROM build AS serving-protos
RUN /opt/pip/bin/pip download --no-cache-dir --no-deps --constraint constraints.txt --dest /wheels tensorflow
COPY scripts/carry_serving_protos.py ./
RUN python3 carry_serving_protos.py /wheels /protos

# ---- what each image installs ---------------------------------------------------------------------------------------
FROM build AS gateway-installed
RUN $INSTALL '.[gateway,redis,tracing]' \
 && $INSTALL --no-deps tensorflow-serving-api \
 && /opt/pip/bin/pip --python /opt/ntm/bin/python uninstall --yes ntm-serving
COPY scripts/slim.py ./
RUN python3 slim.py /opt/ntm
COPY --from=serving-protos /protos/ /opt/ntm/lib/python3.11/site-packages/
COPY --from=wheel /wheels/ /wheels/
RUN $INSTALL --no-deps /wheels/ntm_serving-*.whl

FROM build AS gateway-embedded-installed
RUN $INSTALL '.[embedded,redis,tracing]' \
 && /opt/pip/bin/pip --python /opt/ntm/bin/python uninstall --yes ntm-serving
COPY --from=wheel /wheels/ /wheels/
RUN $INSTALL --no-deps /wheels/ntm_serving-*.whl

FROM build AS model-server-installed
RUN $INSTALL '.[model-server]' \
 && /opt/pip/bin/pip --python /opt/ntm/bin/python uninstall --yes ntm-serving
COPY --from=wheel /wheels/ /wheels/
RUN $INSTALL --no-deps /wheels/ntm_serving-*.whl

FROM build AS trainer-installed
RUN $INSTALL '.[gpu]' \
 && /opt/pip/bin/pip --python /opt/ntm/bin/python uninstall --yes ntm-serving
COPY --from=wheel /wheels/ /wheels/
RUN $INSTALL --no-deps /wheels/ntm_serving-*.whl

# ---- the images -----------------------------------------------------------------------------------------------------
FROM python AS trainer
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ntm-serving trainer" \
      org.opencontainers.image.description="Trains a Neural Turing Machine and exports it to be served" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="https://github.com/ntm-serving/ntm-serving" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=trainer-installed /opt/ntm /opt/ntm
# Matplotlib and Keras look for a folder of their own to write to.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib KERAS_HOME=/tmp/keras
WORKDIR /tmp
USER 65532:65532
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "training.train"]

FROM python AS model-server
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ntm-serving model server" \
      org.opencontainers.image.description="TensorFlow Serving's API over SavedModels, in Python" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="https://github.com/ntm-serving/ntm-serving" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=model-server-installed /opt/ntm /opt/ntm
WORKDIR /tmp
USER 65532:65532
EXPOSE 8500
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-m", "service.health", "127.0.0.1:8500"]
ENTRYPOINT ["ntm-model-server"]
CMD ["--model-dir=/models", "--listen=127.0.0.1:8500", "--enable-grpc-healthcheck-service"]

FROM python AS gateway-embedded
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ntm-serving gateway with embedded models" \
      org.opencontainers.image.description="A gRPC gateway for recurrent state that runs the models itself" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="https://github.com/ntm-serving/ntm-serving" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=gateway-embedded-installed /opt/ntm /opt/ntm
ENV NTM_HEALTH_LISTEN=127.0.0.1:50052
WORKDIR /tmp
USER 65532:65532
EXPOSE 50051
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-m", "service.health", "127.0.0.1:50052"]
ENTRYPOINT ["ntm-serve"]

# The last one, which a build without --target makes.
FROM python AS gateway
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ntm-serving gateway" \
      org.opencontainers.image.description="A gRPC gateway for recurrent state, with its models on TensorFlow Serving" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="https://github.com/ntm-serving/ntm-serving" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=gateway-installed /opt/ntm /opt/ntm
ENV NTM_HEALTH_LISTEN=127.0.0.1:50052
WORKDIR /tmp
USER 65532:65532
EXPOSE 50051
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-m", "service.health", "127.0.0.1:50052"]
ENTRYPOINT ["ntm-serve"]
