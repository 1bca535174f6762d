"""What tests share: real daemons, real client processes, real files."""
