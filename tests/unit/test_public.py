"""What a user sees of the package itself."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import raydistill

ROOT = Path(__file__).resolve().parents[2]


def test_one_version():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert raydistill.__version__ == declared == version("raydistill")
    assert f"## [{declared}]" in (ROOT / "CHANGELOG.md").read_text()


def test_settings_are_read_without_torch_and_ray():
    code = (
        "import sys, pkgutil, importlib, raydistill.config as c\n"
        "for m in pkgutil.iter_modules(c.__path__): importlib.import_module('raydistill.config.' + m.name)\n"
        "print(sorted({'torch', 'ray', 'deepspeed', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_documents_are_short_and_plain():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert (ROOT / name).read_text(encoding="utf-8").isascii(), name
