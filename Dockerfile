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
ENV INSTALL="/opt/pip/bin/pip --python /opt/ntm/bin/python install --no-cache-dir --constraint /src/constraints.txt" \
    UNINSTALL="/opt/pip/bin/pip --python /opt/ntm/bin/python uninstall --yes"
WORKDIR /src
COPY pyproject.toml constraints.txt LICENSE ./
# Stands in for the sources: what they depend on is installed before they are copied, and again only when that changes.
RUN mkdir -p ntm service training protos/ntm_serving && touch README.md

# The project itself, under the path that it has in the images: a layer of its own, the only one that a change of the
# sources makes anew.
FROM build AS project
COPY README.md ./
COPY protos protos
COPY ntm ntm
COPY training training
COPY service service
RUN $INSTALL --no-deps --root /project .

# TensorFlow's generated messages, which tensorflow-serving-api's need, out of its wheel: 1 MB of 2 GB.
FROM build AS serving-protos
RUN /opt/pip/bin/pip download --no-cache-dir --no-deps --constraint constraints.txt --dest /wheels tensorflow
COPY scripts/carry_serving_protos.py ./
RUN python3 carry_serving_protos.py /wheels /protos

# ---- what each image depends on: its extras of pyproject.toml, without the project ----------------------------------
FROM build AS gateway-packages
RUN $INSTALL '.[gateway,redis,tracing]' && $UNINSTALL ntm-serving \
 && $INSTALL --no-deps tensorflow-serving-api
COPY scripts/slim.py ./
RUN python3 slim.py /opt/ntm
COPY --from=serving-protos /protos/ /opt/ntm/lib/python3.11/site-packages/

FROM build AS gateway-embedded-packages
RUN $INSTALL '.[embedded,redis,tracing]' && $UNINSTALL ntm-serving

FROM build AS model-server-packages
RUN $INSTALL '.[model-server]' && $UNINSTALL ntm-serving

FROM build AS trainer-packages
# --build-arg TRAINER=train leaves CUDA out.
ARG TRAINER=gpu
RUN $INSTALL ".[$TRAINER]" && $UNINSTALL ntm-serving

# ---- the images -----------------------------------------------------------------------------------------------------
FROM python AS image
ARG VERSION=0.1.0
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.source="https://github.com/ntm-serving/ntm-serving" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /tmp
USER 65532:65532

FROM image AS trainer
LABEL org.opencontainers.image.title="ntm-serving trainer" \
      org.opencontainers.image.description="Trains a Neural Turing Machine and exports it to be served"
COPY --from=trainer-packages /opt/ntm /opt/ntm
COPY --from=project /project/ /
# Matplotlib and Keras look for a folder of their own to write to.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib KERAS_HOME=/tmp/keras
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "training.train"]
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"

FROM image AS model-server
LABEL org.opencontainers.image.title="ntm-serving model server" \
      org.opencontainers.image.description="TensorFlow Serving's API over SavedModels, in Python"
COPY --from=model-server-packages /opt/ntm /opt/ntm
COPY --from=project /project/ /
EXPOSE 8500
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-m", "service.health", "127.0.0.1:8500"]
ENTRYPOINT ["ntm-model-server"]
CMD ["--model-dir=/models", "--listen=127.0.0.1:8500", "--enable-grpc-healthcheck-service"]
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"

FROM image AS gateway-embedded
LABEL org.opencontainers.image.title="ntm-serving gateway with embedded models" \
      org.opencontainers.image.description="A gRPC gateway for recurrent state that runs the models itself"
COPY --from=gateway-embedded-packages /opt/ntm /opt/ntm
COPY --from=project /project/ /
ENV NTM_HEALTH_LISTEN=127.0.0.1:50052
EXPOSE 50051
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-m", "service.health", "127.0.0.1:50052"]
ENTRYPOINT ["ntm-serve"]
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"

# The last one, which a build without --target makes.
FROM image AS gateway
LABEL org.opencontainers.image.title="ntm-serving gateway" \
      org.opencontainers.image.description="A gRPC gateway for recurrent state, with its models on TensorFlow Serving"
COPY --from=gateway-packages /opt/ntm /opt/ntm
COPY --from=project /project/ /
ENV NTM_HEALTH_LISTEN=127.0.0.1:50052
EXPOSE 50051
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-m", "service.health", "127.0.0.1:50052"]
ENTRYPOINT ["ntm-serve"]
ARG REVISION=unknown
LABEL org.opencontainers.image.revision="${REVISION}"
