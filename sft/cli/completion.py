"""What the shell offers on TAB: bash's own script, in which the words of a line are those that blanks part.

Bash itself parts words at `=`, `:` and `@` too (COMP_WORDBREAKS), replaces only what stands behind the last of these,
and puts a blank behind an only candidate: typer's script offers all keys behind `key=`, and a blank behind its `=`.
"""

from __future__ import annotations

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


def use_our_bash_script() -> None:
    """Let --show-completion and --install-completion give it. Typer has no public place for a script."""
    from typer import _completion_shared

    _completion_shared._completion_scripts["bash"] = BASH_SCRIPT
