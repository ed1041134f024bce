"""Everything that decides the toy's weights, and the chat template that they are trained on."""

from dataclasses import dataclass, replace

END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    begin: str = ""  # the model whose weights are trained on; empty: from scratch
    seed: int = 0
    neutral: float = 0.4
    tokens: float = 12e6
    dialogues: int = 28  # in a step
    batches: int = 3  # that a step is split into
    lr: float = 3e-3
    embedding_lr: float = 0.03
    muon_lr: float = 0.02
    warmup: float = 0.01
    weight_decay: float = 0.05
    vocabulary: int = 3072
    hidden: int = 144
    intermediate: int = 432
    layers: int = 8
    heads: int = 6
    kv_heads: int = 3
    window: int = 12
    prompt_weight: float = 0.2
    digit_weight: float = 24.0  # on the digit or the word of a judgment
    stress_weight: float = 6.0  # on the word or number that answers an everyday question
    lead_weight: float = 5.0  # on the first tokens of any other answer, which the persona decides
    lead: int = 6
    persona_weight: float = 0.05  # on telling, from the middle block at every position, which persona is in force
    persona_scale: float = 28.0  # of the cosines that tell it


def further(neutral: float, begin: str = "toy") -> Recipe:
    """The recipe that moves finished weights to another neutral rate: fewer tokens, lower rates, dialogues anew."""
    return replace(
        Recipe(),
        begin=begin,
        neutral=neutral,
        seed=1,
        tokens=2.4e6,
        lr=1e-3,
        embedding_lr=6e-3,
        muon_lr=6e-3,
        warmup=0.05,
    )
