# The images of the suite, a target for each service: `docker build --target gateway .`, or all of
# them with `docker compose build`. docs/deployment.md says how they are run.
#
# They run on BASE: Python 3.11, 3.12 or 3.13 and nothing else. WORKER_BASE is the same for prefill
# and decode; on a GPU it needs a C compiler too, which Triton calls when kernels are first used.
# BUILD_BASE is the same Python with venv, its headers and a C compiler; nothing of it is in an
# image, that Python has to be at the same place as in the others.
ARG BASE=python:3.11-slim-bookworm
ARG WORKER_BASE=python:3.11-bookworm
ARG BUILD_BASE=python:3.11-bookworm

# ---- Packages: what pyproject.toml and constraints.txt say, so a change of code is none of these.
FROM ${BUILD_BASE} AS build
ARG PIP_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# pip stays here: it installs into an environment that has none.
RUN python3 -m venv /opt/build \
    && python3 -m venv --without-pip /opt/venv \
    && if [ -n "$PIP_INDEX_URL" ]; then \
        /opt/build/bin/pip config --global set global.index-url "$PIP_INDEX_URL"; fi
ENV INSTALL="/opt/build/bin/pip --python /opt/venv/bin/python install --constraint constraints.txt"
WORKDIR /src
COPY pyproject.toml constraints.txt LICENSE ./

FROM build AS packages
RUN $INSTALL .

FROM packages AS packages-gateway
RUN $INSTALL '.[gateway]' && find /opt/venv -depth -type d -name tests -exec rm -rf {} +

FROM packages AS packages-scheduler
RUN $INSTALL '.[scheduler]'

FROM packages AS packages-predictor
RUN $INSTALL '.[predictor]' && find /opt/venv -depth -type d -name tests -exec rm -rf {} +

FROM packages AS packages-placer
RUN $INSTALL '.[placer]'

FROM packages AS packages-cli
RUN $INSTALL '.[cli]'

FROM packages AS packages-kvstore
RUN $INSTALL '.[kvstore,ucx]' && find /opt/venv/lib/*/site-packages/numpy -depth -type d -name tests -exec rm -rf {} +

# TORCH_INDEX is where torch comes from, if not from where everything else does:
# https://download.pytorch.org/whl/cpu has the builds without CUDA.
FROM packages-kvstore AS packages-worker
ARG TORCH_INDEX=
RUN if [ -n "$TORCH_INDEX" ]; then $INSTALL --no-deps --index-url "$TORCH_INDEX" torch; fi
RUN $INSTALL '.[worker,ucx]'

# ---- The kernels for CPUs. libgomp goes with them, for bases that lack it.
FROM build AS kernels
COPY setup.py ./
COPY shared/engine/native shared/engine/native
RUN LDFLAGS='-Wl,-rpath,$ORIGIN' /opt/build/bin/pip install --no-deps --target /kernels . \
    && mkdir /out && cp /kernels/shared/engine/native/_kernels_*.so /out \
    && cp -L "$(gcc -print-file-name=libgomp.so.1)" /out

# ---- Our own code: in /out/<service> what its image gets, readable by everybody.
FROM build AS code
COPY shared shared
COPY services services
COPY cli cli
COPY deploy/healthcheck.py deploy/claim_gpu.py deploy/
RUN chmod -R a+rX . \
    && python3 -m compileall -q --invalidation-mode unchecked-hash shared services cli \
    && for service in gateway predictor scheduler prefill decode kvstore placer; do \
        mkdir -p /out/$service/services \
        && cp -a shared deploy /out/$service \
        && cp -a services/__init__.py services/$service /out/$service/services \
        || exit 1; done \
    && mkdir /out/cli && cp -a shared cli pyproject.toml /out/cli

# ---- What all images have. A service writes to /tmp only, so the rest can be mounted read-only.
FROM ${BASE} AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/banyan HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    BANYAN_HEALTH_PORT_FILE=/tmp/health.port
RUN echo 'banyan:x:10001:10001:Banyan:/tmp:/bin/sh' >> /etc/passwd \
    && echo 'banyan:x:10001:' >> /etc/group
WORKDIR /opt/banyan
USER 10001:10001

FROM base AS service
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-S", "/opt/banyan/deploy/healthcheck.py"]

FROM ${WORKER_BASE} AS worker
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/banyan HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    BANYAN_HEALTH_PORT_FILE=/tmp/health.port \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN echo 'banyan:x:10001:10001:Banyan:/tmp:/bin/sh' >> /etc/passwd \
    && echo 'banyan:x:10001:' >> /etc/group \
    && mkdir -p /run/banyan/gpus && chown 10001:10001 /run/banyan/gpus
COPY --from=packages-worker /opt/venv /opt/venv
COPY --from=kernels /out /opt/banyan/shared/engine/native
WORKDIR /opt/banyan
USER 10001:10001
# Loading a large model takes minutes; until then a failing check does not count.
HEALTHCHECK --interval=5s --timeout=3s --start-period=30m --retries=3 \
    CMD ["python", "-I", "-S", "/opt/banyan/deploy/healthcheck.py"]
# The launcher becomes the service: UCX wants it to be process 1 (docs/deployment.md).
ENTRYPOINT ["python", "/opt/banyan/deploy/claim_gpu.py"]

# ---- The images.
FROM service AS gateway
COPY --from=packages-gateway /opt/venv /opt/venv
COPY --from=code /out/gateway /opt/banyan
EXPOSE 8000
CMD ["python", "-m", "services.gateway"]

FROM service AS predictor
COPY --from=packages-predictor /opt/venv /opt/venv
COPY --from=code /out/predictor /opt/banyan
CMD ["python", "-m", "services.predictor"]

FROM service AS scheduler
COPY --from=packages-scheduler /opt/venv /opt/venv
COPY --from=code /out/scheduler /opt/banyan
CMD ["python", "-m", "services.scheduler"]

FROM service AS kvstore
COPY --from=packages-kvstore /opt/venv /opt/venv
COPY --from=code /out/kvstore /opt/banyan
CMD ["python", "-m", "services.kvstore"]

FROM service AS placer
COPY --from=packages-placer /opt/venv /opt/venv
COPY --from=code /out/placer /opt/banyan
CMD ["python", "-m", "services.placer"]

FROM base AS cli
COPY --from=packages-cli /opt/venv /opt/venv
COPY --from=code /out/cli /opt/banyan
ENTRYPOINT ["banyan"]

FROM worker AS prefill
COPY --from=code /out/prefill /opt/banyan
CMD ["python", "-m", "services.prefill"]

FROM worker AS decode
COPY --from=code /out/decode /opt/banyan
CMD ["python", "-m", "services.decode"]
