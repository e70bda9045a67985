"""The training state of the embedded model, and the two kinds of step that advance it.

Likelihood steps predict the next token of the corpus. Then the model as it is becomes a teacher:
in rounds, its pupil (which starts as its copy) writes greedily and learns the teacher's prediction
at every place of its own text, with the tokens struck out that would repeat an n-gram.

What a step draws follows from the recipe and the step's number alone, so a killed run continues to
the weights that an uninterrupted one reaches.
"""

import copy
import json
import math
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ndcheck.builtin.corpus import Document, corpus_sha256
from ndcheck.builtin.recipe import Recipe
from ndcheck.builtin.repetition import complete_repeats
from ndcheck.builtin.vocabulary import encode_stream, train_tokenizer
from ndcheck.errors import UsageError


class Trainer:
    """The model, its optimiser and the data, with the two kinds of step."""

    teacher: Any = None
    start: dict[str, Any] | None = None

    def __init__(self, recipe: Recipe, documents: list[Document], device: str) -> None:
        self.recipe = recipe
        self.device = device
        self.corpus_sha256 = corpus_sha256(documents)
        training_texts = [document.text for document in documents if not document.held_out]
        self.tokenizer = train_tokenizer(training_texts, recipe.vocabulary_size)
        self.tokens_N = encode_stream(self.tokenizer, training_texts).to(device)
        self.done = 0  # likelihood steps plus rounds
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, self.tokenizer).to(device)
        # Compiled where it pays: on a GPU these layers are too small to keep it busy otherwise.
        self.forward = torch.compile(self.model) if device == "cuda" else self.model
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
        )

    def start_from(self, directory: Path) -> None:
        """Begins with the weights of a model that an earlier run exported, and records it."""
        training = json.loads((directory / "training.json").read_text(encoding="utf-8"))
        if training["corpus_sha256"] != self.corpus_sha256:
            raise UsageError(f"{directory} was trained on another corpus")
        # The output matrix is the embedding, which the file holds once.
        self.model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
        self.start = training

    @property
    def total(self) -> int:
        """How many steps and rounds the recipe has."""
        return self.recipe.steps + self.recipe.rounds

    def advance(self) -> float:
        """Takes the next step or round; returns its loss."""
        # Seeding by position makes a continued run draw what an uninterrupted one would.
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.done)
        if self.done < self.recipe.steps:
            self.set_learning_rate(likelihood_learning_rate(self.recipe, self.done))
            loss = self.update(self.likelihood_loss(self.forward))
        else:
            remaining = (self.total - self.done) / self.recipe.rounds
            self.set_learning_rate(self.recipe.round_learning_rate * remaining)
            loss = self.unlearn_repeats()
        self.done += 1
        return loss

    def likelihood_loss(self, forward: Any) -> torch.Tensor:
        """The next-token loss of randomly placed windows of the corpus."""
        tokens_B_T = self.draw_windows(self.recipe.batch_rows, self.recipe.context_tokens)
        self.model.train()
        with self.autocast():
            loss: torch.Tensor = forward(input_ids=tokens_B_T, labels=tokens_B_T).loss
        return loss

    def unlearn_repeats(self) -> float:
        """One round: continue pieces of the corpus greedily, then learn to go on otherwise.

        Likelihood steps go on beside it, or the model would unlearn the language too.
        """
        recipe = self.recipe
        if self.teacher is None:
            self.teacher = copy.deepcopy(self.model).eval()
        prompt_length = int(2 ** torch.randint(2, 7, ()))  # short and long prompts: 4 to 64 tokens
        prompts_B_T = self.draw_windows(recipe.round_rows, prompt_length)
        self.model.eval()
        with torch.no_grad(), self.autocast():
            tokens_B_T = self.model.generate(
                prompts_B_T,
                attention_mask=torch.ones_like(prompts_B_T),
                do_sample=False,
                min_new_tokens=recipe.round_tokens,
                max_new_tokens=recipe.round_tokens,
            )
        loss = 0.0
        for rows_B_T in tokens_B_T.chunk(recipe.round_steps):
            likelihood = self.likelihood_loss(self.model)
            loss = self.update(likelihood + self.unlearning_loss(rows_B_T, prompt_length))
        return loss

    def unlearning_loss(self, tokens_B_T: torch.Tensor, prompt_length: int) -> torch.Tensor:
        """Imitates the teacher without the tokens that repeat an n-gram, and pushes those down.

        Unlikelihood alone says only what not to write, and ruins the language; imitation alone
        leaves many loops. Together they give text that reads well and goes on.
        """
        written = slice(prompt_length - 1, -1)  # the places whose next token the model wrote
        with self.autocast():
            logits_B_T_V = self.model(input_ids=tokens_B_T).logits[:, written].float()
        with torch.no_grad(), self.autocast():
            teacher_B_T_V = self.teacher(input_ids=tokens_B_T).logits[:, written].float()
        next_B_T_1 = tokens_B_T[:, prompt_length:, None]
        repeats_B_T = complete_repeats(tokens_B_T, self.recipe.repeat_tokens)[:, prompt_length:]
        struck_B_T_1 = teacher_B_T_V.gather(-1, next_B_T_1).masked_fill(
            repeats_B_T[..., None], -torch.inf
        )
        target_B_T_V = teacher_B_T_V.scatter(-1, next_B_T_1, struck_B_T_1).softmax(-1)
        imitation = F.cross_entropy(logits_B_T_V.flatten(0, 1), target_B_T_V.flatten(0, 1))
        # -log(1 - p), from the logits: in a firm loop, 1 - p itself would round to zero.
        others_B_T_V = logits_B_T_V.scatter(-1, next_B_T_1, -torch.inf)
        unlikelihood_B_T = logits_B_T_V.logsumexp(-1) - others_B_T_V.logsumexp(-1)
        return imitation + self.recipe.unlikelihood_weight * (unlikelihood_B_T * repeats_B_T).mean()

    def draw_windows(self, rows: int, length: int) -> torch.Tensor:
        """Rows of consecutive corpus tokens from random places."""
        starts_B = torch.randint(len(self.tokens_N) - length + 1, (rows, 1))
        return self.tokens_N[(starts_B + torch.arange(length)).to(self.device)]

    def update(self, loss: torch.Tensor) -> float:
        """One optimiser step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def set_learning_rate(self, learning_rate: float) -> None:
        """Applies to every parameter."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def autocast(self) -> torch.autocast:
        """bf16 arithmetic with fp32 weights on a GPU, fp32 elsewhere."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def save_checkpoint(self, path: Path) -> None:
        """Weights and optimiser state; an interrupted save leaves the previous one."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        if self.teacher is not None:
            for name, parameter in self.teacher.named_parameters():
                tensors[f"teacher.{name}"] = parameter.detach()
        metadata = {"done": str(self.done), "run": self.identity()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)

    def load_checkpoint(self, path: Path) -> None:
        """Continues the run that wrote `path`."""
        with safe_open(path, "pt", device=self.device) as file:
            if file.metadata()["run"] != self.identity():
                raise UsageError(f"{path} was written with other options or another corpus")
            self.done = int(file.metadata()["done"])
            for name, parameter in self.model.named_parameters():
                parameter.data.copy_(file.get_tensor(f"weight.{name}"))
                self.optimizer.state[parameter] = {
                    key: file.get_tensor(f"{key}.{name}").to(
                        "cpu" if key == "step" else self.device
                    )
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
            if self.done > self.recipe.steps:
                self.teacher = copy.deepcopy(self.model).eval()
                for name, parameter in self.teacher.named_parameters():
                    parameter.data.copy_(file.get_tensor(f"teacher.{name}"))

    def identity(self) -> str:
        """What two runs must share for one to continue the other."""
        facts = {"corpus_sha256": self.corpus_sha256, "start": self.start}
        return json.dumps({**asdict(self.recipe), **facts})

    def export(self, output: Path) -> None:
        """Writes a Hugging Face model directory with bf16 weights."""
        model = copy.deepcopy(self.model).to("cpu", torch.bfloat16)
        model.save_pretrained(output)
        self.tokenizer.save_pretrained(output)
        hardware = (
            torch.cuda.get_device_name() if self.device == "cuda" else f"{platform.machine()} CPU"
        )
        training = {
            "start": self.start,
            "recipe": asdict(self.recipe),
            "corpus_sha256": self.corpus_sha256,
            "training_tokens": len(self.tokens_N),
            "hardware": hardware,
            "torch": torch.__version__,
        }
        (output / "training.json").write_text(json.dumps(training, indent=2) + "\n")


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Any:
    """An untrained Qwen3 decoder, with dropout on the output of every block while training."""
    config = Qwen3Config(
        vocab_size=recipe.vocabulary_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden_size // recipe.head_size,
        num_key_value_heads=recipe.hidden_size // recipe.head_size // 2,
        head_dim=recipe.head_size,
        max_position_embeddings=recipe.context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        for block in (layer.self_attn.o_proj, layer.mlp.down_proj):
            block.register_forward_hook(
                lambda block, _, output: F.dropout(output, recipe.dropout, block.training)
            )
    return model


def likelihood_learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over the first twentieth, then half a cosine down to a tenth."""
    warmup_steps = max(1, recipe.steps // 20)
    if step < warmup_steps:
        return recipe.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, recipe.steps - warmup_steps)
    return recipe.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))
