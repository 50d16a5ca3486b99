"""train.py's command line: `[preset or run folder] [options]` -> Config, by tyro."""

import argparse
import dataclasses

import tyro

from core import checkpoint
from core.config import (
    DATASETS,
    PRESETS,
    RACE,
    STDLIB,
    SYNTHETIC,
    TOKEN_DATASETS,
    Config,
    RaceConfig,
    check_ranges,
    preset,
)
from core.machine import choose_device_type
from core.run import AUTO, saved_config
from core.stopping import UserError, check_utf8, expanded


def parse_args(argv: list[str]) -> Config | RaceConfig:
    """Exits with help, or with one error in tyro's words on a wrong option; UserError on a wrong value.

    The options' defaults are those of the preset for the device, or those of the run that goes on.
    """
    check_utf8(argv)
    word, options = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    if word == RACE:
        return _race(options)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--device")
    peek.add_argument("--resume")
    peek.add_argument("--out")
    peek.add_argument("--dry-run", action="store_true")
    known, _ = peek.parse_known_args(options)
    name, resume = (word, known.resume) if word is None or word in PRESETS else (None, word)
    if known.resume not in (None, resume):
        raise UserError(f"{word} and --resume {known.resume}: give one run to continue")
    automatic = resume == AUTO and resume != word
    if automatic:
        if not known.out:
            raise UserError("--resume auto continues what is in the run folder, or starts there: give it with --out")
        resume = known.out if checkpoint.checkpoints(expanded(known.out)) else None
    if resume:
        if resume == word and not expanded(resume).exists():
            raise UserError(f"{word} is neither a preset ({', '.join((*PRESETS, RACE))}) nor a run folder")
        default = dataclasses.replace(saved_config(resume, known.out), resume=resume)
        if name not in (None, default.preset):
            raise UserError(f"{resume} is a run of preset {default.preset}, not {name}: omit the preset")
    else:
        planned = known.dry_run and known.device  # a plan needs no device
        default = preset(name or PRESETS[0], planned or choose_device_type(known.device))
    config = tyro.cli(
        Config,
        prog="train.py [preset or run folder]",
        description=(
            f"Train a language model. Presets: {', '.join(PRESETS)} (default {PRESETS[0]}); shown values are those "
            f"of {default.preset} on this machine. A run folder continues that run. {RACE}, the race to a validation "
            f"loss of 3.28, has options of its own: train.py {RACE} --help."
        ),
        default=default,
        args=options,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    check_ranges(config)
    if automatic and resume:
        config = dataclasses.replace(config, resume=resume)
    if config.mended_data and not resume:
        raise UserError("--mended-data says that the text of a run was changed since: give the run with --resume")
    if config.json and not config.dry_run:
        raise UserError("--json prints the plan of a --dry-run: give both")
    if config.data.path not in (STDLIB, *DATASETS):  # a run can be resumed from another folder
        path = str(expanded(config.data.path).resolve())
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=path))
    return config


def _race(options: list[str]) -> RaceConfig:
    """Of `train.py fineweb`."""
    config = tyro.cli(
        RaceConfig,
        prog=f"train.py {RACE}",
        description="Train to a validation loss of 3.28 on FineWeb, as fast as possible.",
        args=options,
    )
    check_ranges(config)
    if config.data in (SYNTHETIC, *TOKEN_DATASETS):
        return config
    return dataclasses.replace(config, data=str(expanded(config.data).resolve()))
