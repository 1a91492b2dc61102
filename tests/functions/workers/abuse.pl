# What a function must not be able to do, tried. Stands in the place of worker.pl's `handler`.
sub handler { my ($id, $event) = @_;
    my ($what, $rest) = split / /, $event->[3], 2;
    return result($id, "$$", 200) if $what eq 'pid';
    if ($what eq 'memory') { my @held; push @held, 'x' x (1 << 20) while 1 }
    if ($what eq 'fork') {
        my $made = 0;
        while ($made < 10_000) {
            my $pid = fork;
            last unless defined $pid;
            unless ($pid) { sleep 600; exit }
            $made++;
        }
        return result($id, $made, 200);
    }
    if ($what eq 'loop') { 1 while 1 }
    if ($what eq 'huge') { syswrite($node, pack('N', 1 << 30)); sleep 600 }
    if ($what eq 'kill') { kill 'KILL', $$; sleep 600 }
    return result($id, tried($what, $rest) ? 'done' : 'refused: ' . ($! + 0), 200);
}
sub tried { my ($what, $rest) = @_;
    if ($what eq 'read') { return open(my $file, '<', $rest) }
    if ($what eq 'write') { return open(my $file, '>', $rest) }
    if ($what eq 'signal') { return kill('KILL', $rest) }
    my $to = pack('S n a4 x8', 2, $rest, "\x7f\0\0\1");    # struct sockaddr_in
    my $socket;
    if ($what eq 'tcp') { return socket($socket, 2, 1, 0) && connect($socket, $to) }
    if ($what eq 'udp') { return socket($socket, 2, 2, 0) && send($socket, 'x', 0, $to) }
    die "no $what\n";
}
