"""A small quantized model, a runtime, and Node.js; what is missing skips the tests that need it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import narrowcast as nc
from narrowcast.errors import KernelError
from narrowcast.export import web_runtime

PAGE = Path(web_runtime.__file__).with_name("web_page")
INSTALLED = "NARROWCAST_ONNXRUNTIME_WEB"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float32 ONNX file of pictures [batch, 3, 12, 12] with 5 classes, and its static-int8 form."""
    import onnx
    import torch
    from tests.onnx_files import graphs

    folder = tmp_path_factory.mktemp("models")
    onnx.save(graphs.residual_network(), folder / "float.onnx")
    data = [torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    nc.save(nc.quantize(str(folder / "float.onnx"), "static-int8", data, progress=False), folder / "int8.onnx")
    return folder / "int8.onnx", folder / "float.onnx"


@pytest.fixture
def hollow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What looks like an installed onnxruntime-web, on a machine without Node.js and npm."""
    folder = tmp_path / "node_modules" / "onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    for name in web_runtime.FILES:
        (folder / "dist" / name).write_text(name)
    (folder / "package.json").write_text(json.dumps({"version": "1.2.3"}))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return folder


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real onnxruntime-web: the one that the environment names, or npm's."""
    if INSTALLED in os.environ:
        return Path(os.environ[INSTALLED])
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    folder = tmp_path_factory.mktemp("npm")
    try:
        web_runtime._install(folder)
    except KernelError as error:
        pytest.skip(f"onnxruntime-web cannot be installed: {error!s:.200}")
    return folder


@pytest.fixture
def javascript(tmp_path: Path) -> Callable[..., Any]:
    """Run a script that imports the page's modules as `./name.js`; what it passes to `give` comes back."""
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    for file in PAGE.glob("*.js"):
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "package.json").write_text('{"type": "module"}')

    def run(script: str, argument: Any = None) -> Any:
        before = (
            "const give = (x) => process.stdout.write(JSON.stringify(x));\nconst given = JSON.parse(process.argv[2]);"
        )
        (tmp_path / "script.js").write_text(f"{script.partition('//')[0]}\n{before}\n{script.partition('//')[2]}")
        done = subprocess.run(
            ["node", "script.js", json.dumps(argument)], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
