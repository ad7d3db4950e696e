"""Where a measured number comes from: the processor and the commit, for the JSON files in bench/results."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def device() -> dict[str, Any]:
    """The processor, as far as it concerns speed; nothing that names the machine."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    flags = set(fields.get("flags", "").split())
    kept = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    model = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "model": model, "cores": os.cpu_count(), "cache": fields.get("cache size", ""), "instructions": kept,
        "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip


def commit() -> tuple[str | None, bool | None]:
    """The commit of the source tree this file lies in, and whether files under `src` differ from it."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None, None

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "src"))
    except (OSError, subprocess.SubprocessError):
        return None, None
