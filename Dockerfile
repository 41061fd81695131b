# 105 MB above python:slim. The packages are installed in a stage of their own, as wheels: no compiler, no pip's cache
# and no root come along. Settings come from the environment (.env.example). For builds that are the same each time, append
# the digest that `docker buildx imagetools inspect python:3.11-slim` shows to both FROM: python:3.11-slim@sha256:…
FROM python:3.11-slim AS build
RUN python -m venv --without-pip /venv
COPY requirements.txt constraints.txt ./
RUN python -m pip --python /venv/bin/python install --no-cache-dir --only-binary :all: -r requirements.txt

FROM python:3.11-slim
RUN useradd --system --no-create-home todo
COPY --from=build /venv /venv
WORKDIR /app
COPY main.py auth.py db.py schema.sql ./
COPY lib lib
COPY pgpipeline/*.py pgpipeline/
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER todo
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=3s CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ.get(\"PORT\") or 8000}/health', timeout=2)"]
CMD exec python -m lib.serve main:app --host 0.0.0.0
