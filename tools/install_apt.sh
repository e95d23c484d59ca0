#!/usr/bin/env bash
# install_apt.sh COMMAND PACKAGE...: make sure COMMAND exists, from Debian's packages where this may be done.
# Says aloud what it skips and why; what needs COMMAND then skips itself aloud too.
set -u
command=$1; shift
command -v "$command" >/dev/null 2>&1 && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "SKIPPED: $command is missing and cannot be installed here (needs root and apt): what uses it is skipped." >&2
  echo "         To have it: sudo apt-get install $*" >&2
  exit 0
fi
echo "installing $* from Debian's packages"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if apt-get update -qq >"$log" 2>&1 && apt-get install -y -qq --no-install-recommends "$@" >>"$log" 2>&1; then
  rm -f "$log"; exit 0
fi
echo "SKIPPED: apt-get could not install $*; its last words:" >&2
tail -n 5 "$log" >&2; rm -f "$log"
exit 0
