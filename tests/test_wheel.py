"""The wheel holds all that the package needs, away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USE = """
import pliant
from pliant import zoo
from pliant.data import load

data = load("mnist5k")
model = zoo.build("lenet5", weights="mnist5k")
result = pliant.compress(model, data, "nrmf", "params=0.3")
assert result.report.verdict.holds and result.report.after.accuracy > 0.96
result.report.save("report")
result.save("small.pliant", source="lenet5")
assert pliant.load("small.pliant")
print(pliant.__file__)
"""


@pytest.mark.slow
def test_a_wheel_works_away_from_the_checkout(tmp_path: Path) -> None:
    pytest.importorskip("build")
    # Built from a copy: an earlier build folder of the checkout would leave its files in it.
    shown = subprocess.run(
        ["git", "ls-files", "src", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    if not shown:
        pytest.skip("not a git checkout: the files of the package cannot be listed")
    copy = tmp_path / "copy"
    for name in shown:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    installed = tmp_path / "installed"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip().startswith(str(installed)), run.stdout
    assert (tmp_path / "report" / "report.html").stat().st_size > 10**6
