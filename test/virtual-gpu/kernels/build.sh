#!/usr/bin/env bash
# Compiles the test kernels to PTX where nvcc is at hand. The PTX is committed: the tests need no compiler.
set -euo pipefail
cd "$(dirname "$0")"
nvcc -arch=compute_80 -std=c++17 -O3 -lineinfo -ptx basic.cu -o basic.ptx
nvcc -arch=compute_80 -std=c++17 -O3 -lineinfo -ptx hgemm.cu -o hgemm.ptx
nvcc -arch=compute_90a -std=c++17 -O3 -lineinfo -ptx hopper.cu -o hopper.ptx
nvcc -arch=compute_90a -std=c++17 -O3 -lineinfo -ptx cluster.cu -o cluster.ptx
# Paths and debug sections say where this was built, not what was built.
sed -i -e '/^\t*\.section/,$d' -e 's|^\(\s*\.file\s*[0-9]*\s*"\).*/|\1|' *.ptx
# Packed as kernels/ptx is.
node -e "const { readFileSync: read, writeFileSync: write, rmSync } = require('fs');
for (const name of ['basic', 'hgemm', 'hopper', 'cluster']) {
  write(name + '.ptx.br', require('zlib').brotliCompressSync(read(name + '.ptx')));
  rmSync(name + '.ptx');
}"
