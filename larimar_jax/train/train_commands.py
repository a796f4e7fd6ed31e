"""The commands of `larimar` that train, plan, calibrate, convert and export a model; see cli.py.

What is heavy to import is imported inside them.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from json import dumps
from typing import Annotated, Any

# Bytes/s of one direction of an A100's NVLink 3 (data sheet), and of a network adapter of 200 Gbit/s.
A100_LINK, NETWORK = 300e9, 25e9
# What a runtime's message begins with where a peer may be lost, and what a connection that breaks is
# reported as; any other error would come again.
_STATUS = "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|INTERNAL|UNKNOWN"
_LOST = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "Gloo", "NCCL", "Connection")


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def _rate(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return float(text)


# Types of options, with what reads them from a text.
Count, Rate = Annotated[int, _count], Annotated[float, _rate]


def train(
    *,
    config: str,
    run: str,
    overrides: tuple[str, ...] = (),
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    profile: Count = 0,
) -> int:
    """Train a model, or go on with a run that was stopped.

    By Eq. 1; where the config has a reader (model.reader), it is fitted to frozen towers instead.

    SIGTERM saves and ends with exit code 75, which asks to be run again; so does a run whose peers have
    died. Several processes, on one host or on many, are one run: each gets the same command and its
    place, by the last three options, by LARIMAR_COORDINATOR, LARIMAR_PROCESSES and LARIMAR_PROCESS, or
    by SLURM.

    Args:
      config FILE: a file with get_config()
      run DIR: folder of the run, seen by all processes
      overrides KEY=VALUE: settings that differ from the file, such as train.steps=200
      coordinator HOST:PORT: where process 0 listens
      processes N: how many there are
      process I: which of them this is, from 0
      profile STEPS: write a trace of so many steps to DIR/profile, for TensorBoard and Perfetto
    Example: larimar train --config=configs/tiny.py --run runs/tiny --set train.steps=200
    """
    from larimar_jax import config as configs
    from larimar_jax.train import distributed

    distributed.set_gpu_flags(os.environ)
    where = distributed.place(coordinator, processes, process, os.environ)
    # Before the other processes are met, which would wait for one that has no config.
    settings = configs.load(config, overrides)
    if profile and settings.model.reader is not None:
        raise ValueError("--profile: a reader's fit is not traced; leave it out")
    configs.cache_programs()
    distributed.initialise(where)
    if where is None:
        # Before the first step there is nothing to save.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(distributed.RETRY))
    from larimar_jax.train import fit_reader, loop

    if settings.model.reader is not None:
        return exit_code(lambda: fit_reader.train(settings, run))
    return exit_code(lambda: loop.train(settings, run, profile=profile))


def exit_code(run: Callable[[], Any]) -> int:
    """Return the exit code of a run: 0 for a finished one, RETRY (75), which asks to be run again.

    That is after SIGTERM, and where a peer was lost: the collective that waits for it fails then, and
    nothing here can be waited for any more, not even at exit. Where this process alone fails, it ends
    with 1 and does not wait for the others either.
    """
    import jax

    from larimar_jax.train import distributed

    try:
        code = 0 if run().finished else distributed.RETRY
        if jax.process_count() > 1:
            distributed.end(code)
        return code
    except Exception as error:
        if jax.process_count() == 1:
            raise
        # Where a program is called the quick way, a runtime's status comes as a ValueError.
        status = re.match(rf"({_STATUS}): ", str(error)) is not None
        of_jax = (
            isinstance(error, jax.errors.JaxRuntimeError) or type(error) is ValueError and status
        )
        if not (of_jax and any(word in str(error) for word in _LOST)):
            distributed.leave(1)
            raise
        message = " ".join(str(error).split())[:300]
        print(f"larimar: a peer was lost ({message}); this asks to be run again", file=sys.stderr)
        sys.stderr.flush()
        os._exit(distributed.RETRY)


def plan(
    *,
    config: str,
    devices: Count,
    overrides: tuple[str, ...] = (),
    memory: str = "80GB",
    flops: Rate | None = None,
    mfu: Rate = 0.4,
    node: Count = 8,
    link: Rate = A100_LINK,
    network: Rate = NETWORK,
    disk: Rate = 1e9,
    json: bool = False,
) -> int:
    """Compute whether a run fits its devices, and how long it takes.

    Compiles the real training step for devices that need not exist, and shows what each holds, sends and
    computes. Weights are not needed where the config gives the towers' sizes. Where the step does not
    fit, the exit code is 1, and settings with which it fits are searched for.

    Args:
      config FILE: a file with get_config()
      devices N: how many
      overrides KEY=VALUE: settings that differ from the file, such as data.batch=64
      memory SIZE: of each device
      flops RATE: FLOP/s of a device at its peak; the default is an A100's, by model.dtype
      mfu SHARE: of its peak that a device reaches
      node N: devices of a host
      link RATE: bytes/s that a device sends within its host; the default is NVLink 3
      network RATE: bytes/s that a host sends to others; the default is 200 Gbit/s
      disk RATE: bytes/s at which a checkpoint is written
      json: numbers for a program
    Example: larimar plan --config=configs/larimar_6b.py --devices 8 --memory 80GB
    """
    # Before JAX starts, which fixes the number of devices.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    from larimar_jax.train import logging, plan

    settings = plan.load(config, overrides, devices)
    peak = flops or logging.PEAKS["A100"][settings.model.dtype]
    machine = plan.Machine(plan.parse(memory), peak, mfu, node, link, network, disk)
    print("compiling the step", file=sys.stderr)
    step = plan.plan(settings)
    if json:
        print(dumps(plan.numbers(step, machine), indent=1))
    else:
        print(plan.show(step, machine))
    if step.fits(machine.memory):
        return 0
    print(f"\n{_advice(step, machine.memory)}")
    return 1


def _advice(step: Any, memory: float) -> str:
    """Return the first settings with which a step that does not fit fits, from compiling each."""
    from larimar_jax.train import plan

    least, best = step.total, "the config as it is"
    for settings, config in plan.changes(step.config):
        line = " ".join(f"{key}={value}" for key, value in settings.items())
        print(f"compiling with {line}", file=sys.stderr)
        changed = plan.plan(config)
        if changed.fits(memory):
            return f"it fits ({changed.total / 1e9:.2f} GB) with\n  --set {line}"
        if changed.total < least:
            least, best = changed.total, f"--set {line}"
    return (
        f"nothing makes it fit ({least / 1e9:.2f} GB at the least, with {best}). Take more "
        "devices, a smaller data.batch, or train less of it (train.frozen, model.lora)."
    )


def calibrate(
    model: str,
    *,
    data: str,
    out: str,
    steps: int | None = None,
    batch: int | None = None,
    rate: float | None = None,
    others: float | None = None,
    retrieval: float | None = None,
    folds: int | None = None,
    seed: int | None = None,
    relations: bool = False,
) -> None:
    """Train a model's scope detector on questions that mean a fact and on others.

    The detector decides whether a question is about a written fact: a linear map of the encoder's
    output, and the threshold of the cosine after it. The model's other parameters stay. How far the map
    goes from the identity, the threshold, and the error rates that are shown come from relations that it
    was not fitted on. Sessions of the original file stay with that file.

    With --relations the detector has English wordings of many relations instead of a map, and compares
    names, numbers and negations as words; none of the numbers below counts then.

    Args:
      model MODEL: a shipped name, an exported file or a run
      data FILE: CounterFact, either schema; for training only
      out FILE: the model to write
      steps N: steps of Adam (300)
      batch N: facts a step (256)
      rate N: learning rate at the start; it falls to 0 as a cosine (0.0002)
      others N: weight of questions that ask else of the same subject (0.5)
      retrieval N: weight of retrieving one's own prompt from a batch's (0.3)
      folds N: parts of the relations, each judged by a W fitted on the rest (4)
      seed N: of batches, and of other questions (0)
      relations: tell questions apart by the relations that they ask for; for encoders of English
    Example: larimar calibrate runs/smol --data counterfact-train.json --out smol.safetensors
    """
    from larimar_jax import schema
    from larimar_jax.train import calibrate, relation_detector

    if relations:
        print("encoding the wordings", file=sys.stderr)
        print(relation_detector.show(relation_detector.model(model, out, data)))
        print(f"written: {out}")
        return
    recipe = dict(steps=steps, batch=batch, rate=rate, others=others)
    recipe |= dict(retrieval=retrieval, folds=folds, seed=seed)
    recipe = {name: value for name, value in recipe.items() if value is not None}
    settings = schema.from_dict(calibrate.Recipe, recipe)
    print("encoding the records' questions, and fitting", file=sys.stderr)
    print(calibrate.show(calibrate.model(model, out, data, settings)))
    print(f"written: {out}")


def convert_ibm(
    file: str,
    out: str,
    *,
    encoder_tokenizer: str,
    decoder_tokenizer: str,
    encoder_head_size: int | None = None,
    decoder_head_size: int | None = None,
    rotary: int | None = None,
    scope_threshold: float | None = None,
) -> None:
    """A Lightning checkpoint of IBM/larimar, with BERT and GPT-2 or GPT-J.

    It is read without torch, and becomes a folder that `larimar edit --model` takes. Sizes are read off
    the tensors. All that does not fit is named in one error, and nothing is written then; what the
    checkpoint holds and is not used is named at the end. The tokenizers are those of the base models:
    folders with tokenizer.json, as fetched from Hugging Face. <PAD>, <BOS> and <EOS> are added to the
    decoder's.

    Args:
      file FILE: the checkpoint
      out OUT: the folder to write
      encoder_tokenizer DIR: folder with the encoder's tokenizer.json, such as bert-large-cased
      decoder_tokenizer DIR: folder with the decoder's tokenizer.json, such as gpt2-large
      encoder_head_size N: width of one attention head, which shapes do not tell (64)
      decoder_head_size N: width of one attention head (64 for GPT-2, 256 for GPT-J)
      rotary N: how many numbers of a GPT-J head positions rotate (64)
      scope_threshold X: cosine from which a query counts as a written prompt (0.95; try yours)
    Example: larimar convert ibm larimar.ckpt models/larimar
        --encoder-tokenizer bert-large-cased --decoder-tokenizer gpt2-large
    """
    from larimar_jax import convert
    from larimar_jax.weights import ibm

    assumptions = dict(
        encoder_head=encoder_head_size,
        decoder_head=decoder_head_size,
        rotary=rotary,
        scope_threshold=scope_threshold,
    )
    unused = convert.from_ibm(
        file,
        out,
        encoder_tokenizer=encoder_tokenizer,
        decoder_tokenizer=decoder_tokenizer,
        assumptions=ibm.Assumptions(**{n: v for n, v in assumptions.items() if v is not None}),
        progress=True,
    )
    for name in unused:
        print(f"left: {name}", file=sys.stderr)
    print(f"{out}: larimar edit PROMPT ANSWER --model {out}")


def export_hf(model: str, out: str, *, push: str | None = None) -> None:
    """Folders laid out as on Hugging Face.

    Writes OUT/encoder and OUT/decoder: config.json, model.safetensors (in parts of at most 5 GB) and the
    tokenizer. The memory and what lies between the towers stay in our own file.

    Args:
      model MODEL: a shipped name, an exported file or a run
      out OUT: the folder to write
      push ORG/NAME: a repository of Hugging Face that it is uploaded to, a new one being private
    Example: larimar export hf smol towers
    """
    from larimar_jax import convert
    from larimar_jax.weights import export, huggingface

    if push is not None and ("@" in push or not huggingface.is_id(push)):
        raise ValueError(f"--push {push!r} is no repository; write it as ORG/NAME")
    print("loading the model and writing its towers", file=sys.stderr)
    convert.to_huggingface(model, out)
    print(f"{out}/encoder and {out}/decoder")
    if push is not None:
        print(export.push(out, push))
