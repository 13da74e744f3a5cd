"""Run the cells of all notebooks as `nbdev_test` does, several at once, the longest first: a long one that begins last leaves the other cores idle."""
import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

LONGEST = ('03_frozen_decoder', '02_gradient_flow', '01_decoder_loading', '06_useful_encoder', '12_experiment', '02_explorer', '04_curves', '20_trainer', '13_tables', '15_study_runs', '14_splits', '08_chain_answers', '12_full_scale', '14_measuring_commands', '15_steering_commands', '11_training_commands')


def place(notebook: Path) -> tuple[int, str]:
    "Where a notebook stands in the queue."
    return LONGEST.index(notebook.stem) if notebook.stem in LONGEST else len(LONGEST), str(notebook)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--workers', type=int, default=2)
    workers = parser.parse_args().workers
    config, started = get_config(), time.monotonic()
    notebooks = sorted((n.absolute() for n in nbglob(as_path=True)), key=place)
    if absent := set(LONGEST) - {n.stem for n in notebooks}: sys.exit(f'tests/notebooks.py: there is no notebook {", ".join(sorted(absent))}')
    failed, took = [], {}
    with ProcessPoolExecutor(workers) as pool:
        running = {pool.submit(test_nb, n, skip_flags=config.tst_flags.split(), basepath=config.config_path): n for n in notebooks}
        for done in as_completed(running):
            (passed, seconds), name = done.result(), running[done].stem
            took[name] = seconds
            if not passed: failed.append(name)
            print(f'{seconds:6.1f} s  {name}{"" if passed else "  FAILED"}', flush=True)
    print(f'{len(notebooks) - len(failed)} of {len(notebooks)} notebooks pass in {time.monotonic() - started:.0f} s; longest: ' + ', '.join(f'{n} {took[n]:.0f}' for n in sorted(took, key=took.get, reverse=True)[:12]))
    if failed: print('failed: ' + ', '.join(sorted(failed)), file=sys.stderr)
    return bool(failed)


if __name__ == '__main__': sys.exit(main())
