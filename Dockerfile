# Build stage: an environment with everything in it. PIP_ARGS passes options to pip, such as another package index:
# by default torch brings its CUDA libraries (several GB); a CPU-only index makes the image far smaller.
FROM python:3.12-slim AS build
ARG PIP_ARGS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /srv/letheon
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# torch in a layer of its own: it is the bulk and changes least.
RUN pip install ${PIP_ARGS} torch==2.13.0
COPY pyproject.toml README.md ./
# Only the dependencies, so that a change of our code does not install them again.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
      print(*p['dependencies'], *p['optional-dependencies']['otel'], sep='\n')" > /tmp/requirements.txt \
    && pip install ${PIP_ARGS} -r /tmp/requirements.txt
COPY . .
# Editable: the migrations are found beside the packages.
RUN pip install ${PIP_ARGS} --no-deps -e .

FROM python:3.12-slim
RUN groupadd --gid 10001 letheon \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/letheon --create-home --shell /usr/sbin/nologin letheon
COPY --from=build /opt/venv /opt/venv
COPY --from=build /srv/letheon /srv/letheon
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 LETHEON_HOME=/var/lib/letheon
# What `sslrootcert=system` means: psycopg's own OpenSSL looks into a folder of its build, which no image has.
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
WORKDIR /srv/letheon
USER letheon
VOLUME /var/lib/letheon
EXPOSE 8600
CMD ["letheon", "serve", "--host", "0.0.0.0"]
