# dapt for serving and for the command line, on a CPU.
#
#     docker build -t dapt .
#     docker run --rm -p 127.0.0.1:8000:8000 -e DAPT_TOKEN=secret -v "$PWD/runs/photos:/run/photos:ro" dapt
#
# Nothing is fetched in the container. A run of another backbone than the bundled one needs its weights there:
#     -v "$HOME/.cache/huggingface:/home/dapt/.cache/huggingface:ro"
# Support images are shown only where they lie at the paths that the run was tuned on: mount them there too.
FROM python:3.12-slim AS build
WORKDIR /source
RUN python -m venv /opt/dapt \
    && /opt/dapt/bin/pip install --no-cache-dir torch torchvision \
       --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/dapt/bin/pip install --no-cache-dir '.[serve,heic]'

FROM python:3.12-slim
RUN useradd --create-home --uid 1000 dapt && mkdir /run/photos
COPY --from=build /opt/dapt /opt/dapt
ENV PATH=/opt/dapt/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
USER dapt
WORKDIR /home/dapt
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["dapt"]
CMD ["serve", "/run/photos", "--host", "0.0.0.0", "--port", "8000"]
