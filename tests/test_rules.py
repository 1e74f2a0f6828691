"""Static rules: who may import what, nothing that runs foreign code, nothing heavy at start-up."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import evenlight

ROOT = Path(__file__).parent.parent
SOURCES = [
    *(p for folder in ("cache", "stages", "pipeline") for p in (ROOT / folder).rglob("*.py")),
    ROOT / "cli.py",
]
IMPORTERS = {
    "zarr": {"cache/shards.py"},
    "pydantic": {"cache/files.py"},
    "boto3": {"cache/bucket.py"},
    "botocore": {"cache/bucket.py"},
    "h5py": {"stages/photos/hdf5.py"},
    "ultralytics": {"stages/priors/fastsam.py"},
    "open_clip": {"stages/priors/open_clip_models.py"},
    "mamba_ssm": {"stages/corrector/scan.py"},
    "triton": {"stages/corrector/scan_triton.py"},
    "safetensors": {
        "stages/corrector/checkpoint.py",
        "stages/priors/clip.py",
        "stages/priors/fastsam_weights.py",
        "stages/priors/judge.py",
        "stages/priors/region_embedder.py",
    },
    "tensorboard": {"stages/corrector/events.py"},
    "onnxruntime": {"stages/runtime.py"},
    "torchmetrics": {"stages/evaluation/metrics.py"},
    "skimage": {"stages/evaluation/metrics.py"},
    "distributed": {"pipeline/schedule.py"},
    "dask": {"pipeline/schedule.py"},
    "typer": {"cli.py"},
    "starlette": {"pipeline/serve.py", "pipeline/serve_guard.py"},
    "uvicorn": {"pipeline/serve.py"},
    "rich": {"pipeline/console.py"},
    "pyvips": {"stages/photos/libvips.py", "stages/photos/tables.py"},
    "pillow_heif": {"stages/photos/heic.py"},
}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def violations(source: str, place: str) -> list[str]:
    """What a file does that the rules forbid."""
    tree = ast.parse(source)
    found = [
        f"{place} imports {name}"
        for name in imports(tree)
        if name in FORBIDDEN_IMPORTS or place not in IMPORTERS.get(name, {place})
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in FORBIDDEN_CALLS:
            found.append(f"{place} calls {name}")
        if name == "torch.load" and keywords.get("weights_only") != "True":
            found.append(f"{place} calls torch.load without weights_only=True")
        if keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
            found.append(f"{place} calls {name} with shell or pickle")
    return found


def test_the_package_keeps_its_rules():
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        assert violations(path.read_text(encoding="utf-8"), place) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import zarr",
        "from ultralytics.nn import tasks",
        "import pickle",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "eval('1')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_the_rules_can_fail(planted):
    assert violations(planted, "pipeline/planted.py")


def floors(imported: dict[str, set[str]]) -> dict[str, int]:
    """module -> longest chain of imports below it and itself.  imported: module -> modules."""
    found: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in found:
            found[name] = 1 + max(map(floor, imported[name]), default=0)
        return found[name]

    return {name: floor(name) for name in imported}


def imported_siblings(source: str, package: str) -> set[str]:
    """Modules of `package` that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package}."):
            found.add(node.module.removeprefix(f"{package}."))
    return found


def test_the_pipeline_has_at_most_six_floors():
    modules = [p for p in (ROOT / "pipeline").glob("*.py") if p.name != "__init__.py"]
    imported = {
        p.stem: imported_siblings(p.read_text(encoding="utf-8"), "evenlight.pipeline")
        for p in modules
    }
    assert max(floors(imported).values()) <= 6, floors(imported)


def test_floors_are_counted_by_the_longest_chain():
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}
    source = "def f():\n    from evenlight.pipeline.plan import x\nfrom evenlight.pipeline import y"
    assert imported_siblings(source, "evenlight.pipeline") == {"plan", "y"}


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    return done.stdout.strip()


def test_the_command_line_starts_without_torch():
    heavy = "[m for m in ('torch', 'zarr', 'cv2') if m in sys.modules]"
    code = f"import sys, evenlight.cli; print({heavy})"
    assert run_python(code) == "[]"
    assert run_python(code.replace("evenlight.cli", "torch")).startswith("['torch'")


def test_looking_into_a_store_imports_no_torch():
    """cache info: also where it compares the store with the models that ship."""
    code = (
        "import sys; from evenlight.pipeline import store_info; "
        "from evenlight.pipeline.models import priors_named; "
        "from evenlight.stages.settings import Settings; "
        "assert all(map(len, priors_named(Settings(), 'x').values())); "
        "print([m for m in ('torch', 'cv2', 'open_clip', 'ultralytics') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_a_local_store_imports_nothing_for_buckets():
    start = (
        "import sys, tempfile; from pathlib import Path; from evenlight.cache.store import Store; "
    )
    found = "; print([m for m in ('boto3', 'botocore', 's3fs') if m in sys.modules])"
    local = "Store.create_or_open(Path(tempfile.mkdtemp(), 'S')).close()"
    assert run_python(start + local + found) == "[]"
    in_bucket = "from evenlight.cache.place import place_of; place_of('s3://bucket/S')"
    assert run_python(start + in_bucket + found) == "['boto3', 'botocore']"


def test_correcting_imports_no_more_than_it_runs():
    code = (
        "import sys; from evenlight import load_predictor; load_predictor(); "
        "print([m for m in ('torch._dynamo', 'triton', 'torchvision', 'timm', 'open_clip', "
        "'torchmetrics', 'skimage', 'zarr', 'dask') if m in sys.modules])"
    )
    assert run_python(code) == "[]"


HEAVY = "[m for m in ('torch', 'zarr', 'cv2', 'numpy', 'PIL', 'rich') if m in sys.modules]"


def test_importing_evenlight_imports_nothing_heavy():
    assert run_python(f"import sys, evenlight; dir(evenlight); print({HEAVY})") == "[]"


def test_the_first_use_of_a_name_imports_what_it_needs():
    for name, torch_too in (("Predictor", False), ("precompute", True)):
        found = run_python(f"import sys, evenlight; evenlight.{name}; print({HEAVY})")
        assert "'numpy'" in found and ("'torch'" in found) == torch_too


def test_every_public_name_is_there_and_no_other():
    for name in evenlight.__all__:
        assert getattr(evenlight, name).__name__ == name
    assert set(evenlight.__all__) <= set(dir(evenlight))
    with pytest.raises(AttributeError, match="no attribute 'mend'"):
        _ = evenlight.mend


def test_no_module_is_imported_under_two_names():
    code = "import sys, evenlight.cache.store; print('cache.store' in sys.modules)"
    assert run_python(code) == "False"


def test_every_package_folder_is_listed_in_pyproject():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(ROOT) for p in SOURCES if p.name == "__init__.py"}
    assert set(listed) == {"evenlight", *(f"evenlight.{'.'.join(f.parts)}" for f in folders)}


def test_every_page_that_a_comment_cites_is_in_the_repository():
    cited = {
        (path.relative_to(ROOT).as_posix(), page)
        for path in (*SOURCES, *(ROOT / "recipes").rglob("*.py"))
        for page in re.findall(r"[\w./-]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert ("stages/corrector/network.py", "docs/method.md") in cited
    assert [one for one in sorted(cited) if not (ROOT / one[1]).is_file()] == []


@pytest.mark.slow
def test_every_recipe_and_benchmark_still_finds_what_it_imports():
    scripts = (*(ROOT / "recipes").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in scripts]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(names)}; print('all')"
    assert len(names) > 10 and run_python(code) == "all"


def test_the_page_on_architecture_names_every_file_and_no_other():
    """Rows are | `folder/a.py`, `b.py` | job |: a bare name stands in the folder named before."""
    named = set()
    for row in (ROOT / "docs/architecture.md").read_text(encoding="utf-8").splitlines():
        folder = Path()
        for name in re.findall(r"`([\w/]+\.py)`", row.split("|")[1] if row.startswith("|") else ""):
            folder = Path(name).parent if "/" in name else folder
            named.add(folder / Path(name).name)
    files = {p.relative_to(ROOT) for p in SOURCES if p.name != "__init__.py"}
    assert named ^ files == set()
