"""The turns of prepared conversations as a Jinja template, which transformers renders."""

import json

from fulmen.data.image_encoding import HEADERS


def chat_template(begin_turn: str, end_turn: str, image: str) -> str:
    """What `apply_chat_template` renders, given the names of three special tokens.

    The same text as tokenise_example's, without the end of the document. An image is its token
    once, which whoever reads pictures repeats. Tokens are the same but where a message begins with
    white space, which a tokenizer may join to the line end before it.
    """
    begin, end, picture, line_end = map(_literal, (begin_turn, end_turn, image, "\n"))
    return (
        f"{{% set headers = {_literal(HEADERS)} %}}"
        "{% for message in messages %}"
        "{% if message['role'] not in headers %}"
        "{{ raise_exception('a role is none of ' + headers | join(', ')) }}"
        "{% endif %}"
        f"{{{{ {begin} + headers[message['role']] }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        f"{{{{ part['text'] if part['type'] == 'text' else {picture} }}}}"
        "{% endfor %}{% endif %}"
        f"{{{{ {end} }}}}"
        f"{{% if add_generation_prompt or not loop.last %}}{{{{ {line_end} }}}}{{% endif %}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        f"{{{{ {begin} + headers['assistant'] }}}}"
        "{% endif %}"
    )


def _literal(value: str | dict[str, str]) -> str:
    # Jinja reads JSON, but for the pairs of escapes that stand for one rare character.
    return json.dumps(value, ensure_ascii=False)
