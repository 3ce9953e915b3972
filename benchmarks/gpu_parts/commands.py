"""The commands of each part of benchmarks/gpu.py, with their time limits."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

TINY_SECONDS = 300.0
"""Of a command at sizes of no interest, on a machine that is busy with other work."""
# Part -> lines as one types them in benchmarks/, each with the seconds that it may take. MEPA-d16 has 1.4 billion
# parameters, whose values a CPU draws in 10 to 20 s for every contender with weights of its own.
_GAINS = "'public' 'public model' no-stored no-prefixes no-summed no-dispatch no-matrices no-loss"
FULL: dict[str, tuple[tuple[str, float], ...]] = {
    "A": (("gpu_parts/ceilings.py --device {device}", 45),),
    "B": (("gpu_parts/checks.py --device {device}", 150),),
    "C": (
        ("gpu_parts/step_profile.py --device {device} --model mepa-d16 --batch 48", 90),
        ("gpu_parts/step_profile.py --device {device} --model var-d16 --batch 64", 60),
        ("gpu_parts/step_profile.py --device {device} --model mepa-d16 --batch 48 --compile", 150),
    ),
    "D": (
        ("train_step.py --device {device} --model mepa-d16 --batch 32 --dtypes bf16 --rounds 5 "
         f"--contenders {_GAINS}", 150),
        ("train_step.py --device {device} --model var-d16 --batch 64 --dtypes bf16 --rounds 5 "
         "--contenders public 'public model' compiled", 120),
    ),
    "E": (
        ("moe.py --no-ep --dtypes bf16 --repeats 5 --threads 8 "
         "--shapes 1024x4096x8 1024x1408x8 1024x4096x64 1024x1408x64", 90),
        ("moe.py --no-ep --dtypes bf16 --repeats 5 --threads 8 --tokens 32640 --imbalances 1 --no-deepspeed "
         "--shapes 1024x4096x8 1024x1408x8 1024x1408x64", 45),
    ),
    "F": (("gpu_parts/attention.py --device {device}", 75),),
    "G": (("checkpoint.py --depth 6 --batch 64 --steps 200 --rounds 2", 75),),
    "H": (
        ("sampling.py --device {device} --images 1 8 64 --repeats 3 --contenders 'plain bf16' 'ours bf16'", 75),
        ("sampling.py --device {device} --images 8 --contenders 'plain fp32' 'ours fp32'", 30),
        ("sampling.py --device {device} --images 64 --contenders 'ours bf16' 'ours compiled'", 120),
    ),
}  # fmt: skip
TINY: dict[str, tuple[str, ...]] = {
    "A": ("gpu_parts/ceilings.py --device {device} --tiny",),
    "B": ("gpu_parts/checks.py --device {device}",),
    "C": ("gpu_parts/step_profile.py --device {device} --model nano --batch 1 --dtype fp32 --rounds 1",),
    "D": ("train_step.py --device {device} --model nano --batch 1 --dtypes fp32 --rounds 1 --threads 1 "
          "--contenders 'public model'",),
    "E": ("moe.py --no-ep --dtypes fp32 --repeats 1 --threads 1 --shapes 16x32x4 --tokens 64 --imbalances 1",),
    "F": ("gpu_parts/attention.py --device {device} --tiny",),
    "G": ("checkpoint.py --depth 1 --batch 2 --steps 4 --rounds 1",),
    "H": ("sampling.py --device {device} --depth 1 --images 1 --repeats 1 --threads 1 "
          "--contenders 'plain fp32' 'ours fp32'",),
}  # fmt: skip
PARTS = tuple(FULL)


@dataclass(frozen=True)
class Command:
    """A program of benchmarks/, for at most `seconds`."""

    program: str
    arguments: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return shlex.join([self.program, *self.arguments])

    @property
    def has_json(self) -> bool:
        """Whether it writes its figures to --json at its end. Those of this folder print each as a JSON line."""
        return not self.program.startswith("gpu_parts/")


def commands_of(part: str, device: str, tiny: bool) -> list[Command]:
    """The commands of a part, in order. `tiny`: sizes of no interest, to see that every line runs."""
    lines = tuple((line, TINY_SECONDS) for line in TINY[part]) if tiny else FULL[part]
    commands = []
    for line, seconds in lines:
        program, *arguments = shlex.split(line.format(device=device))
        commands.append(Command(program, tuple(arguments), seconds))
    return commands
