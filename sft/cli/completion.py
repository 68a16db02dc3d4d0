"""What the shell offers on TAB: bash's own script, in which the words of a line are those that blanks part.

Bash itself parts words at `=`, `:` and `@` too (COMP_WORDBREAKS), replaces only what stands behind the last of these,
and puts a blank behind an only candidate: typer's script offers all keys behind `key=`, and a blank behind its `=`.
"""

from __future__ import annotations

import glob
from pathlib import Path

BASH_SCRIPT = r"""
%(complete_func)s() {
    local IFS=$'\n' rest=${COMP_LINE:0:COMP_POINT} words=() word part found i
    for ((i = 0; i <= COMP_CWORD; i++)); do
        if ((i == 0)) || [[ $rest == [[:space:]]* ]]; then words+=(""); fi
        rest=${rest#"${rest%%%%[![:space:]]*}"}
        part=${COMP_WORDS[i]}
        if ((i == COMP_CWORD)); then part=$rest; fi
        words[${#words[@]}-1]+=$part
        rest=${rest#"$part"}
    done
    word=${words[${#words[@]}-1]}
    COMPREPLY=()
    while read -r found; do
        if [[ -n $found ]]; then COMPREPLY+=("${found#"${word%%"$2"}"}"); fi
    done < <(env COMP_WORDS="${words[*]}" COMP_CWORD=$((${#words[@]} - 1)) %(autocomplete_var)s=complete_bash "$1")
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[=/] ]]; then compopt -o nospace; fi
}

complete -o default -F %(complete_func)s %(prog_name)s
"""
"""The script that --show-completion and --install-completion give."""


def complete_shipped(incomplete: str) -> list[str]:
    """Return the shipped recipes that begin like this, for the shell."""
    from sft.core.shipped import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes, recipe files and folders that begin like this, for the shell."""
    found = [path for path in sorted(Path().glob(f"{glob.escape(incomplete)}*"))]
    files = [str(path) for path in found if path.suffix in (".yaml", ".yml")]
    return [*complete_shipped(incomplete), *files, *(f"{path}/" for path in found if path.is_dir())]


def complete_override(incomplete: str) -> list[str]:
    """Return the dotted keys of a recipe, or the values of one that has a few, that begin like this, for the shell."""
    from sft.recipe.json_schema import choices_of, dotted_keys

    key, equals, _ = incomplete.partition("=")
    if equals:
        return [found for value in choices_of(key) if (found := f"{key}={value}").startswith(incomplete)]
    return [f"{key}=" for key in dotted_keys() if key.startswith(incomplete)]
