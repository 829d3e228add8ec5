# megatron_dms on NVIDIA's PyTorch container, which brings CUDA builds of torch, Transformer Engine and Apex that
# were made for each other. None of the three may be replaced by pip: a torch from the package index is binary
# incompatible with the container's Transformer Engine and Apex.
#
#   docker build -t megatron_dms .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v DATA:/data -it megatron_dms
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

# The container sets PIP_CONSTRAINT to its own list of versions, among them some that are older than what
# megatron-core and transformers need here. It is replaced by the list made below.
ENV PIP_CONSTRAINT= PIP_NO_CACHE_DIR=1

WORKDIR /workspace/megatron_dms
COPY setup.py pyproject.toml constraints.txt ./

# versions.txt: the container's own builds at exactly the versions that are there, then constraints.txt less
# those, and less the CUDA wheels and Triton that only the index's torch wants.
RUN python - <<'PYTHON'
import re
from importlib.metadata import distributions

ours = re.compile(r"^(torch|torchvision|torchao|triton|pytorch[-_]triton|transformer[-_]engine.*|apex|flash[-_]attn.*|numpy)$")
kept = {d.name.lower(): d.version for d in distributions() if ours.match(d.name.lower())}
assert "torch" in kept, "this base image has no torch: take a tag of nvcr.io/nvidia/pytorch"
tested = [line.strip() for line in open("constraints.txt") if "==" in line and not line.startswith("#")]
dropped = re.compile(r"^(nvidia-(?!modelopt)|cuda-|triton==)")
with open("/tmp/versions.txt", "w") as out:
    out.writelines(f"{name}=={version}\n" for name, version in kept.items())
    out.writelines(f"{line}\n" for line in tested
                   if line.split("==")[0].lower() not in kept and not dropped.match(line.lower()))
PYTHON

COPY . .
# The last line fails where pip put another torch in the place of the container's after all.
RUN pip install -c /tmp/versions.txt -e ".[dev,eval]" \
    && grep -qx "torch==$(python -c 'from importlib.metadata import version; print(version("torch"))')" /tmp/versions.txt
