# shellcheck shell=bash
# Sourced: packages of other Debian releases than this host's, without touching its apt.

# The mirror that this host already uses.
debian_mirror() {
  local m
  # shellcheck disable=SC2016 # apt's own placeholder
  m=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | awk '/debian/ && !/security/ && !n++')
  [ -n "$m" ] || { echo "no Debian mirror in this host's apt configuration" >&2; return 1; }
  echo "$m"
}

# private_apt DIR 'deb SUITE'|'deb-src SUITE'...: an apt configuration of its own in DIR, with lists of
# these suites from the mirror that this host already uses. Signatures are checked. Use it with
# APT_CONFIG=DIR/apt.conf.
private_apt() {
  local dir=$1 m line k='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
  shift
  mkdir -p "$dir/lists/partial"
  cat > "$dir/apt.conf" <<CONF
Dir::State::Lists "$dir/lists";
Dir::Cache "$dir";
Dir::Etc::SourceList "$dir/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::Check-Valid-Until "false";
CONF
  m=$(debian_mirror) || return 1
  for line; do echo "${line% *} $k $m ${line##* } main"; done > "$dir/sources.list"
  APT_CONFIG=$dir/apt.conf apt-get update -qq
}
