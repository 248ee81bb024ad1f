# Two images from one file. Without --target: for a host with a GPU, torch with CUDA. With
# --target cpu: ONNX Runtime and no torch. docs/deployment.md says how to run and check them.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# What the service needs, and nothing of the service: this layer changes with constraints.txt only.
# No pip inside; the base image's one installs from outside.
FROM ${BASE_IMAGE} AS venv-cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
RUN python -m venv --without-pip /opt/venv
COPY pyproject.toml constraints.txt ./
COPY client/pyproject.toml client/
RUN python -c "import tomllib; projects = [tomllib.load(open(path + 'pyproject.toml', 'rb'))['project'] for path in ('', 'client/')]; print(*(needed for project in projects for needed in project['dependencies'] if not needed.startswith('tamiyo-client')), sep='\n')" > requirements.txt \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir \
        --constraint constraints.txt --requirement requirements.txt \
    && find /opt/venv -type d -name tests -prune -exec rm -r {} +

FROM venv-cpu AS venv-cuda
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['optional-dependencies']['torch'], sep='\n')" > requirements.txt \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir \
        --constraint constraints.txt --requirement requirements.txt

# What the tests and benchmarks of a mounted checkout take on a GPU: deploy/verify.sh runs them in it.
FROM venv-cuda AS gpu-test
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['optional-dependencies']['dev'], sep='\n')" > requirements.txt \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir \
        --constraint constraints.txt --requirement requirements.txt
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/src:/src/client \
    PYTHONDONTWRITEBYTECODE=1
ENTRYPOINT ["python"]

# The project beside its dependencies, so that an upgrade of it fetches a small layer.
FROM ${BASE_IMAGE} AS project
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY client client
COPY model model
COPY export export
COPY service service
RUN python -m pip install --no-cache-dir --no-deps --target /opt/tamiyo ./client .

# What the image serves where nothing is mounted. Exporting takes torch; serving it does not.
FROM venv-cuda AS artifact
COPY --from=project /opt/tamiyo /opt/tamiyo
RUN PYTHONPATH=/opt/tamiyo /opt/venv/bin/python -m export \
        --preset tamiyo-v1 --seed 0 --formats torchscript,onnx --output /artifacts

FROM ${BASE_IMAGE} AS runtime
ARG SOURCE
ARG REVISION
LABEL org.opencontainers.image.title="tamiyo-serve" \
      org.opencontainers.image.description="Batching POST /act service for exported recurrent policies" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 tamiyo \
    && useradd --uid 10001 --gid tamiyo --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin tamiyo \
    # A volume that is mounted here for --snapshot is the service's own.
    && install --directory --owner tamiyo --group tamiyo --mode 0700 /state
# PYTHONSAFEPATH: the working directory is what was mounted, and nothing is imported from there.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/tamiyo \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TAMIYO_ARTIFACT=/artifacts \
    TAMIYO_HOST=0.0.0.0 \
    TAMIYO_PORT=8000
# Here TAMIYO_ARTIFACT=best means /artifacts/best.
WORKDIR /artifacts
EXPOSE 8000
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import http.client, os; connection = http.client.HTTPConnection('127.0.0.1', int(os.environ['TAMIYO_PORT']), timeout=4); connection.request('GET', '/readyz'); raise SystemExit(connection.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "service"]

FROM runtime AS cpu
COPY --from=venv-cpu /opt/venv /opt/venv
COPY --from=project /opt/tamiyo /opt/tamiyo
COPY --from=artifact /artifacts /artifacts

FROM runtime AS cuda
# What the NVIDIA Container Toolkit brings in where it is not told.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=venv-cuda /opt/venv /opt/venv
COPY --from=project /opt/tamiyo /opt/tamiyo
COPY --from=artifact /artifacts /artifacts
