# Sourced by run.sh: two network namespaces with a cable between them as hosts.

mkdir -p /run/netns
mount -t tmpfs none /run/netns
left=kvds-left right=kvds-right
cut_down() {
  local name pid
  for name in $left $right; do
    for pid in $(ip netns pids $name 2>/dev/null); do kill -9 "$pid" 2>/dev/null || true; done
    ip netns del $name 2>/dev/null || true
  done
}
trap cut_down EXIT
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
# Starts RUN on both hosts; sets pids. One minute is the least that the process groups' timeout can be.
start_both() {
  local name=$1 node=0 host
  pids=()
  for host in $left $right; do
    DEEPSPEED_TIMEOUT=1 ip netns exec $host deepspeed --no_ssh --node_rank $node --hostfile "$scratch/hostfile" \
      --master_addr 10.77.0.1 --master_port 12345 launch/distill.py --config $recipe --output_dir "$scratch/$name" "${@:2}" \
      >>"$scratch/$name-$node.log" 2>&1 &
    pids+=($!)
    node=$((node + 1))
  done
}

start_both two-hosts
for pid in "${pids[@]}"; do wait "$pid" || fail 'two hosts: a side failed'; done
python tests/cluster/compare.py "$scratch/two-hosts" "$scratch/host" 12 || fail 'two hosts: another result than on one'
pass 'two hosts over gloo: the result of one host'

start_both severed --max_steps $long --save_steps 4
wait_for_step "$scratch/severed" 300 || fail 'severed: the run did not begin'
ip -n $left link set cable0 down
severed=$SECONDS
for pid in "${pids[@]}"; do
  wait "$pid" && fail 'severed: a side ended as if all was well'
done
took=$((SECONDS - severed))
[ $took -le 150 ] || fail "severed: the sides took $took s to notice, with a timeout of 60 s"
for node in 0 1; do
  grep -qiE 'timed out|timeout|connection (closed|reset)|no answer' "$scratch/severed-$node.log" || fail "severed: host $node does not say why it ended"
done
ip -n $left link set cable0 up
start_both severed --max_steps $long --save_steps 4
for pid in "${pids[@]}"; do wait "$pid" || fail 'severed: the second attempt failed'; done
grep -q 'resumed from step' "$scratch/severed-0.log" || fail 'severed: the second attempt did not resume'
python tests/cluster/compare.py "$scratch/severed" "$scratch/host-long" $long || fail 'severed: another result'
pass "a cut cable: both sides ended with a reason after $took s, the run resumed and ended equal"
