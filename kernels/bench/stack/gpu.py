"""What results/proofs holds: proofs and tables of an 8B from nothing, and this stack's manifest.

    PYTHONPATH=.:kernels python -m bench.stack.gpu OUT_DIR

From the repository's root, on a GPU, in about four minutes; each part has a limit of its own, and
what it wrote stays if another fails. The commands are ndcheck's own, with an empty cache:

    ndcheck kernels prove --tune --export OUT_DIR/proofs.json
    ndcheck kernels manifest OUT_DIR/manifest.json --dtype bf16
    python -m bench.stack.run_to_run OUT_DIR
    ndcheck kernels prove --import OUT_DIR/proofs.json      # into another empty cache

and between them a configuration that groups K by M is planted among the candidates, and a table is
looked for under one changed version.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]
PLANT = """
import torch
from ndcheck_kernels.cuda import candidates, configs
from ndcheck_kernels.measure import prove
from bench.stack.gpu import planted_among
where = torch.device("cuda", torch.cuda.current_device())
shape = prove.shape_of(4096, 4096, torch.bfloat16, where)
planted_among(prove, candidates.CANDIDATES[25][2])
proof = prove.prove(shape, where, {})
print("planted:", candidates.CANDIDATES[25][2].label)
print("shut out:", proof.shut_out, "control:", proof.control or "caught")
"""
VERSIONS = """
import torch
from ndcheck_kernels.cuda.products import proofs
where = torch.device("cuda", torch.cuda.current_device())
here = proofs.environment(where)
for name in ("none", *here):
    proofs.forget()
    proofs.environment = lambda _, n=name: here | ({} if n == "none" else {n: "another"})
    print(f"changed: {name}: {proofs.summary(where)[:90]}")
"""


def planted_among(prove: object, config: object) -> None:
    """Make one candidate cut K once more from 200 rows on: what no single row shows."""
    own = prove.runner  # type: ignore[attr-defined]
    from ndcheck_kernels.cuda.configs import ONE_FOR_ALL

    def runner(chosen: object, groups: int) -> object:
        if chosen != config:
            return own(chosen, groups)
        return lambda x, w, c: own(ONE_FOR_ALL, groups + (len(x) >= 200))(x, w, c)

    prove.runner = runner  # type: ignore[attr-defined]


def run(name: str, out: Path, seconds: float, cache: str, *command: str) -> None:
    """One part, its output in NAME.txt and, where it is short, on the screen."""
    started = time.monotonic()
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": cache, "COLUMNS": "150"}
    with (out / f"{name}.txt").open("w") as file:
        try:
            code: object = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                timeout=seconds, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = "out of time"
    print(f"== {name}: {code} after {time.monotonic() - started:.0f} s", flush=True)
    print("\n".join((out / f"{name}.txt").read_text().splitlines()[-32:]), flush=True)


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    empty, other = (tempfile.mkdtemp() for _ in range(2))
    ndcheck = ("-m", "ndcheck", "kernels")
    proofs, manifest = str(out.resolve() / "proofs.json"), str(out.resolve() / "manifest.json")
    prove = (*ndcheck, "prove", "--tune", "--export", proofs, "--quiet")
    run("prove", out, 180, empty, *prove)
    for kept in Path(empty).rglob("proofs-*.json"):  # There even where time ran out.
        shutil.copy(kept, proofs)
    run("manifest", out, 80, empty, *ndcheck, "manifest", manifest, "--dtype", "bf16", "--quiet")
    run("run_to_run", out, 65, empty, "-m", "bench.stack.run_to_run", str(out.resolve()), "45")
    run("planted", out, 30, empty, "-c", PLANT)
    run("versions", out, 20, empty, "-c", VERSIONS)
    run("import", out, 45, other, *ndcheck, "prove", "--import", proofs, "--quiet")
    if Path(proofs).is_file():
        kept = json.loads(Path(proofs).read_text())
        (out / "environment.json").write_text(json.dumps(kept["environment"], indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
