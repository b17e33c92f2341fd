"""Chat templates are downloaded programs: each is tried, and refused if it takes too much memory or never ends."""

import functools
import json
import logging
import os
import subprocess
import sys
import textwrap

from memdlm.errors import CheckpointError

log = logging.getLogger(__name__)

SECONDS, MEMORY, MOST_CHARACTERS = 5, 2**30, 2**20
"""The most that the rendering of two short messages may take."""

# Renders as transformers does, in the same sandbox. A process of its own, because it can be stopped.
_TRIAL = """
    import json, sys
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
        resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
    except (ImportError, ValueError, OSError):
        pass
    import jinja2, jinja2.ext, jinja2.sandbox
    class Generation(jinja2.ext.Extension):
        tags = {{"generation"}}
        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)
    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)
    given = json.load(sys.stdin)
    try:
        made = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        made.globals["raise_exception"] = refuse
        made.globals["strftime_now"] = lambda form: form
        made.filters["tojson"] = lambda value, **options: json.dumps(value)
        count = 0
        for part in made.from_string(given["template"]).generate(**given["values"]):
            count += len(part)
            if count > {characters}:
                sys.exit(3)
    except MemoryError:
        sys.exit(3)
    except Exception:
        # A template that refuses these messages says so when it is used.
        pass
"""


@functools.cache
def check_template(template: str, name: str) -> None:
    """Raise CheckpointError when `template`, of the tokenizer `name`, prints without end or does not finish."""
    values = {
        "messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}],
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    code = textwrap.dedent(_TRIAL).format(memory=MEMORY, seconds=SECONDS, characters=MOST_CHARACTERS)
    try:
        status = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps({"template": template, "values": values}),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
            capture_output=True,
            timeout=2 * SECONDS,
        ).returncode
    except subprocess.TimeoutExpired:
        status = 3
    except OSError as error:
        log.warning("%s: its chat template could not be tried in a process of its own: %s", name, error)
        return
    if status != 0:
        raise CheckpointError(
            f"{name}: the chat template does not end on two short messages, or prints more than {MOST_CHARACTERS} "
            "characters. Use the tokenizer that belongs to the model, or correct its chat_template."
        )
