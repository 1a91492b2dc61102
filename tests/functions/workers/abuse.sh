#!/bin/sh
# What a function must not be able to do, tried: one process per call.
read -r what rest
case $what in
  pid) echo $PPID ;;
  memory) x=xxxxxxxxxxxxxxxx; while :; do x=$x$x; done ;;
  fork) n=0; while [ $n -lt 500 ]; do sleep 600 & n=$((n + 1)); done ;;
  loop) while :; do :; done ;;
  huge) head -c 1073741824 /dev/zero ;;
  kill) kill -9 $PPID; sleep 600 ;;
  read) cat "$rest" > /dev/null && echo done || echo refused: cat ;;
  write) { true > "$rest"; } 2> /dev/null && echo done || echo refused: sh ;;
  signal) kill -9 "$rest" && echo done || echo refused: kill ;;
  tcp) perl -e 'socket(S, 2, 1, 0) or print "refused: $!"' || echo refused: perl ;;
  udp) perl -e 'socket(S, 2, 2, 0) or print "refused: $!"' || echo refused: perl ;;
esac
