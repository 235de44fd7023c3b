#!/usr/bin/env bash
# Packs the Python of SGLang 0.5.23 for a GPU machine that reaches no package index:
#   tests/integrations/pack_sglang.sh OUT.tar.xz     (16 MB, two minutes)
# There, with torch, torchvision and transformers:
#   mkdir sgl && tar xJf OUT.tar.xz -C sgl
#   PYTHONPATH=$PWD/sgl:. pytest -m gpu tests/integrations/test_sglang_gpu.py
# Its compiled kernels are left out: the test stands in for them.
set -euo pipefail
out=$(realpath -m "${1:?usage: pack_sglang.sh OUT.tar.xz}")
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
site=$work/site; mkdir "$site"
flags=(--no-deps --no-cache-dir --only-binary=:all: --python-version 3.12 --implementation cp)
flags+=(--abi cp312 --abi abi3 --abi none --platform any --platform manylinux2014_x86_64)
for n in 34 31 28 24 17 12; do flags+=(--platform "manylinux_2_${n}_x86_64"); done
python3 -m pip download -q "${flags[@]}" -d "$work" sglang==0.5.23
python3 -m pip install -q --no-compile "${flags[@]}" --target "$site" \
  annotated-types==0.8.0 apache-tvm-ffi==0.1.11 compressed-tensors==0.18.0 dill==0.4.1 einops==0.8.2 \
  fastapi==0.165.0 gguf==0.19.0 httpcore2==2.16.2 httpx2==2.16.2 ipython==9.18.1 jiter==0.19.0 \
  loguru==0.7.3 msgspec==0.22.0 openai==3.57.0 orjson==3.13.0 partial-json-parser==0.2.1.1.post7 \
  pybase64==1.5.1 pydantic==2.14.4 pydantic-core==2.50.5 pyzmq==27.3.0 setproctitle==1.3.8 \
  sniffio==1.3.1 starlette==1.10.0 traitlets==5.16.1 truststore==0.10.5 typing-inspection==0.4.5 \
  zstandard==0.25.0
python3 - "$work" "$site" <<'PY'
import glob, sys, zipfile

work, site = sys.argv[1:]
with zipfile.ZipFile(glob.glob(work + "/sglang-*.whl")[0]) as wheel:
    for name in wheel.namelist():
        text = name.endswith((".py", ".json")) or ".dist-info/" in name
        if name.startswith(("sglang/multimodal_gen/", "sglang/test/")):
            continue
        if text or (name.startswith("sglang/kernels/jit/") and not name.endswith(".so")):
            wheel.extract(name, site)
PY
rm -rf "$site"/zstandard/_cffi*
find "$site" -name __pycache__ -prune -exec rm -rf {} +
tar cf - -C "$site" . | xz -T0 -6 > "$out"
ls -l "$out"
