"""The embedded model as GGUF: python make_gguf.py LLAMA_CPP_DIRECTORY OUTPUT.gguf

llama.cpp's converter knows tokenizers by a hash that ours is not among; its kind is GPT-2's.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ndcheck.builtin import MODEL_DIRECTORY

source, output = Path(sys.argv[1]), sys.argv[2]
sys.path[:0] = [str(source), str(source / "gguf-py")]

from conversion import base, qwen  # noqa: E402  found on the path that is set above

base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
qwen.Qwen3Model.set_vocab = lambda self: self._set_vocab_gpt2()
sys.argv = ["convert", str(MODEL_DIRECTORY), "--outfile", output, "--outtype", "f16"]
runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")
