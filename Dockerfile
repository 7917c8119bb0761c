# The service and its embedded model, without torch. How to build, run and harden it: docs/deployment.md.
#
#   docker build --tag fovea:cpu .
#   docker build --tag fovea:openvino --build-arg TARGET=openvino .
#
# Two stages: pip, compilers and the sources stay in the first. Needs BuildKit (Docker's own since version 23).
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# cpu, cuda or openvino: the extra of pyproject.toml that brings ONNX Runtime. They overwrite each other: one per image.
ARG TARGET=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# The environment that serves has no pip of its own.
RUN python -m venv --without-pip /opt/venv
# What is depended on comes before the sources, so that a change of the sources installs nothing anew: the ranges of
# pyproject.toml at the versions of constraints.txt.
COPY pyproject.toml constraints.txt ./
# Two optional secrets, which stay out of the image: `ca_bundle`, certificates for a network that re-signs TLS, and
# `pip_conf`, pip's configuration for an index of one's own.
RUN --mount=type=secret,id=ca_bundle --mount=type=secret,id=pip_conf \
    case "${TARGET}" in cpu|cuda|openvino) ;; *) echo "TARGET is cpu, cuda or openvino, not ${TARGET}" >&2; exit 2 ;; esac \
    && if [ -s /run/secrets/ca_bundle ]; then export PIP_CERT=/run/secrets/ca_bundle; fi \
    && if [ -s /run/secrets/pip_conf ]; then export PIP_CONFIG_FILE=/run/secrets/pip_conf; fi \
    && python -c "import tomllib; \
whole = tomllib.load(open('pyproject.toml', 'rb')); project = whole['project']; \
print(*whole['build-system']['requires'], sep='\n', file=open('build.txt', 'w')); \
print(*project['dependencies'], *project['optional-dependencies']['${TARGET}'], sep='\n', file=open('requirements.txt', 'w'))" \
    && python -m pip install --constraint constraints.txt --requirement build.txt \
    && python -m pip --python /opt/venv/bin/python install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY models ./models
COPY app ./app
# From here on without the network.
RUN python -m pip wheel --no-index --no-deps --no-build-isolation --wheel-dir dist . \
    && python -m pip --python /opt/venv/bin/python install --no-index --no-deps dist/*.whl


FROM ${BASE}
RUN groupadd --gid 10001 fovea \
    && useradd --uid 10001 --gid fovea --no-log-init --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin fovea
# ONNX Runtime reports to its maker from version 1.29 on, unless told not to.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FOVEA_HTTP__HOST=0.0.0.0 \
    FOVEA_HTTP__PORT=8000 \
    ORT_DISABLE_TELEMETRY=1
COPY --from=build /opt/venv /opt/venv
WORKDIR /
USER 10001:10001
EXPOSE 8000
# Ready, not only alive: 503 while models load and while requests drain counts as unhealthy.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['FOVEA_HTTP__PORT'] + '/health/ready', timeout=2)"]
# Without a shell between, so that SIGTERM reaches the service, which drains and exits with 0.
STOPSIGNAL SIGTERM
CMD ["fovea", "serve"]
