# Sourced by cases.sh: two network namespaces with a cable between them, each with a host name of its own, as hosts.

mkdir -p /run/netns
mount -t tmpfs none /run/netns
{ cat /etc/hosts; printf '10.77.0.1 kvds-left\n10.77.0.2 kvds-right\n'; } >"$scratch/hosts"
mount --bind "$scratch/hosts" /etc/hosts
left=kvds-left right=kvds-right
ip netns add $left && ip netns add $right || skip 'network namespaces cannot be named here'
ip link add cable0 netns $left type veth peer name cable0 netns $right || skip 'no veth devices here'
ip -n $left addr add 10.77.0.1/24 dev cable0
ip -n $right addr add 10.77.0.2/24 dev cable0
for name in $left $right; do
  ip -n $name link set lo up
  ip -n $name link set cable0 up
done
begun=$SECONDS

printf '10.77.0.1 slots=1\n10.77.0.2 slots=1\n' >"$scratch/hostfile"
export GLOO_SOCKET_IFNAME=cable0
patience=20
# Starts RUN on both hosts; sets pids.
start_both() {
  local node=0 host
  pids=()
  for host in $left $right; do
    ip netns exec $host unshare --uts bash -c 'echo "$0" >/proc/sys/kernel/hostname; exec "$@"' $host \
      deepspeed --no_ssh --node_rank $node --hostfile "$scratch/hostfile" --master_addr 10.77.0.1 --master_port 12345 \
      launch/distill.py --config $recipe --output_dir "$scratch/$1" --rank_timeout $patience >>"$scratch/$1-$node.log" 2>&1 &
    pids+=($!)
    node=$((node + 1))
  done
}

start_both two-hosts
for pid in "${pids[@]}"; do wait "$pid" || fail 'two hosts: a side failed'; done
python tests/cluster/compare.py "$scratch/two-hosts" "$reference" || fail 'two hosts: another result than on one'
pass 'deepspeed --no_ssh on two hosts, ZeRO-3 over gloo: ended as on one host'

start_both severed
wait_until 120 saved severed || fail 'cut cable: the run did not begin'
ip -n $left link set cable0 down
cut=$SECONDS
for pid in "${pids[@]}"; do
  wait "$pid" && fail 'cut cable: a side ended as if all was well'
done
took=$((SECONDS - cut))
[ $took -le $((patience + 25)) ] || fail "cut cable: the sides took $took s to end, with --rank_timeout $patience"
for node in 0 1; do
  grep "kvds: error: rank $((1 - node)) is dead or hangs" "$scratch/severed-$node.log" || fail "cut cable: host $node does not say why it ended"
done
ip -n $left link set cable0 up
start_both severed
for pid in "${pids[@]}"; do wait "$pid" || fail 'cut cable: the second attempt failed'; done
grep -q 'resumed from step' "$scratch/severed-0.log" || fail 'cut cable: the second attempt did not resume'
python tests/cluster/compare.py "$scratch/severed" "$reference" || fail 'cut cable: another result'
pass "a cut cable: both sides ended with a reason after $took s, the run resumed and ended equal"
