"""``ghn_client.finetune`` imports with what the client declares; extras are asked for where they are used."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = ("PIL", "pyarrow", "peft", "transformers", "lightning", "ghn_service", "ghn_architectures")


def test_no_extra_is_needed_to_import():
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if any(name == blocked or name.startswith(blocked + '.') for blocked in {BLOCKED!r}):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import ghn_client.finetune as finetune\n"
        "import torch\n"
        "finetune.norm_only(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)))\n"
        "print('tuned')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "tuned", done.stderr
