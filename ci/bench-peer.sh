#!/usr/bin/env bash
# Installs llama.cpp, the peer of `mobile-export bench --vs llama.cpp`, into an environment of its own.
# It is compiled on this machine for this machine's processor. Needs a C++ compiler; takes minutes.
set -euo pipefail
VERSION=0.3.36
cache=${MOBILE_EXPORT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mobile-export}
venv=$cache/peers/llama.cpp
# llama.cpp's own defaults, said aloud, and no tools that the bench does not use.
export CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_CPU_REPACK=ON \
-DGGML_OPENMP=ON -DLLAMA_CURL=OFF -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF"
"${PYTHON:-python3.11}" -m venv "$venv"
"$venv/bin/pip" install --quiet --no-binary llama-cpp-python "llama-cpp-python==$VERSION"
# What the bench writes into its report: a compiled library does not say how it was compiled.
printf '{"package": "llama-cpp-python %s", "compiler": "%s", "cmake": "%s"}\n' \
    "$VERSION" "$(${CXX:-c++} --version | head -n 1)" "$CMAKE_ARGS" > "$venv/build.json"
"$venv/bin/python" -c 'import llama_cpp; print(llama_cpp.llama_print_system_info().decode())'
