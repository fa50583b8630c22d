"""Write gpu_benchmark.py: the benchmark's source, the modules of this package that it uses and Accelerate, in one file."""

import ast
import base64
import importlib.metadata
import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[2] / "xtransfer"


def modules(source):
    """The modules of the package that a program needs, and those that they need."""
    found, waiting = {"__init__"}, [source]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop())):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").split(".")[0] == "xtransfer"):
                module = (node.module or "").removeprefix("xtransfer").strip(".")
                names = [module] if module else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("xtransfer.")]
            for name in {name.split(".")[0] for name in names} - found:
                if (path := PACKAGE / f"{name}.py").exists():
                    found.add(name)
                    waiting.append(path.read_text())
    return sorted(found)


def packed(files):
    """A zip of named texts, the same to the bit from the same texts, in base64."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, text in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), text, zipfile.ZIP_DEFLATED)
    return base64.b64encode(data.getvalue()).decode()


def accelerate_files():
    """Accelerate's Python files and what says its version; a machine that has it uses its own."""
    root = Path(importlib.util.find_spec("accelerate").origin).parent
    files = {f"accelerate/{p.relative_to(root)}": p.read_text() for p in root.rglob("*.py")}
    version = importlib.metadata.version("accelerate")
    return files | {f"accelerate-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: accelerate\nVersion: {version}\nLicense: Apache-2.0\n"}


def main(target):
    source = (HERE / "source.py").read_text()
    payloads = {"xtransfer": packed({f"xtransfer/{name}.py": (PACKAGE / f"{name}.py").read_text() for name in modules(source)}), "accelerate": packed(accelerate_files())}
    lengths = json.loads((HERE / "lengths.json").read_text())
    for line, value in (("PAYLOADS = {}", payloads), ("LENGTHS = {}", lengths)):
        assert source.count(line + "  #") == 1
        source = source.replace(line, f"{line[:-2]}{value!r}")
    Path(target).write_text(source)
    print(f"{target}: {Path(target).stat().st_size / 2**20:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "gpu_benchmark.py")
