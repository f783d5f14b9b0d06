#!/usr/bin/env bash
# A federation whose members have a network each: docs/federation.md, "On three machines", with a namespace for a machine.
# Needs Linux and root: bench/machines.sh NEW-FOLDER, with `fedgrove` of an environment with fedgrove[flare] in the PATH.
set -euo pipefail
mkdir -p "$1"; folder=$(realpath "$1"); cd "$folder"
sites=(ash birch cedar); texts=(publisher software theatre)
demo=$(python -c 'import fedgrove, pathlib; print(pathlib.Path(fedgrove.__file__).parent / "demo")')
on() { local machine=$1; shift; ip netns exec "fg-$machine" "$@"; }

end() {
  for machine in "${sites[@]}" server; do on "$machine" fedgrove federation stop "$folder/$machine" || true; done
  for machine in server office "${sites[@]}"; do ip netns del "fg-$machine" || true; rm -rf "/etc/netns/fg-$machine"; done
  ip link del fg-switch || true
}
trap 'end > end.log 2>&1' EXIT

ip link add fg-switch type bridge; ip link set fg-switch up
number=1
for machine in server office "${sites[@]}"; do
  ip netns add "fg-$machine"
  ip link add "fg-$number" type veth peer name eth0 netns "fg-$machine"
  ip link set "fg-$number" master fg-switch up
  on "$machine" ip addr add "10.77.0.$number/24" dev eth0
  on "$machine" ip link set eth0 up; on "$machine" ip link set lo up
  mkdir -p "/etc/netns/fg-$machine"; printf '127.0.0.1 localhost\n10.77.0.1 fl.example.org\n' > "/etc/netns/fg-$machine/hosts"
  number=$((number + 1))
done

fedgrove federation init --name wards --server fl.example.org:8002 "${sites[@]/#/--site=}" --operator ops@example.org
fedgrove federation kits
mv kits/server server
printf 'threads = 1\n[models]\ngrove-6m = "%s/grove-6m"\n' "$demo" > server/server.toml
for i in "${!sites[@]}"; do
  mv "kits/sites/${sites[i]}" "${sites[i]}"
  printf 'data = ["%s/texts/%s.txt"]\nthreads = 1\n[models]\ngrove-6m = "%s/grove-6m"\n' "$demo" "${texts[i]}" "$demo" \
    > "${sites[i]}/site.toml"
done
for machine in server "${sites[@]}"; do on "$machine" fedgrove federation start "$machine"; done
for machine in "${sites[@]}"; do on "$machine" fedgrove federation doctor "$machine" > "doctor-$machine.txt"; done
grep -h -E '(server|clock|process) ' doctor-*.txt

cat > job.toml <<'END'
name = "first"
[model]
path = "grove-6m"
[[stages]]
kind = "prune"
pruner = "wanda"
sparsity = 0.5
[rounds]
timeout = 600
END
kit=kits/operators/ops@example.org
on office fedgrove federation status --kit $kit
on office fedgrove federation submit job.toml --kit $kit --watch
on office fedgrove federation fetch --kit $kit --out first

echo "--- who listens, beside the loopback address"
for machine in server "${sites[@]}"; do echo "$machine: $(on "$machine" ss -Hltn | awk '$4 !~ /^(127\.|\[::1\])/ {print $4}' | xargs)"; done
{ sed "s|\"grove-6m\"|\"$demo/grove-6m\"|" job.toml
  for i in "${!sites[@]}"; do
    printf '[[clients]]\nname = "%s"\ndata = "%s/texts/%s.txt"\n' "${sites[i]}" "$demo" "${texts[i]}"
  done; } > alone.toml
OMP_NUM_THREADS=1 fedgrove run alone.toml --out alone --quiet
cmp first/model/model.safetensors alone/model/model.safetensors && echo "the model is that of one machine, bit for bit"
