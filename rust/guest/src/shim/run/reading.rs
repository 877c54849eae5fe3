//! The shim's ears: connections that come, and bytes of clients, the guest, the console and the machine's program.

use std::io::Read;

use super::{CHANNEL_GRACE_MS, CLIENTS_MAX, DEAF_MS, Pipes, Shim, is_passing};
use crate::protocol::Broken;
use crate::shim::clients::ClientId;
use crate::shim::link::{Link, News};

impl Shim {
    pub(super) fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                // One too many is closed at once: it learns it now rather than never.
                Ok((stream, _)) if self.streams.len() < CLIENTS_MAX && stream.set_nonblocking(true).is_ok() => {
                    self.hub.add_client(self.next_client);
                    self.streams.insert(self.next_client, stream);
                    self.next_client += 1;
                }
                Ok(_) => {}
                Err(error) if is_passing(&error) => return,
                Err(_) => {
                    self.deaf_ms = Some(self.hub.now_ms + DEAF_MS); // no descriptors are left; asking at once again would help nobody
                    return;
                }
            }
        }
    }

    pub(super) fn read_client(&mut self, id: ClientId) {
        let Some(mut stream) = self.streams.get(&id) else { return };
        match stream.read(&mut self.buffer) {
            Ok(0) => self.drop_client(id),
            Ok(n_bytes) => {
                if let Some(client) = self.hub.clients.get_mut(&id) {
                    client.decoder.feed(&self.buffer[..n_bytes]);
                }
                if self.hear_client(id).is_err() {
                    self.drop_client(id);
                }
            }
            Err(error) if is_passing(&error) => {}
            Err(_) => self.drop_client(id),
        }
    }

    fn hear_client(&mut self, id: ClientId) -> Result<(), Broken> {
        while let Some(client) = self.hub.clients.get_mut(&id) {
            match client.decoder.next_frame()? {
                Some(frame) => self.hub.on_client_frame(id, frame)?,
                None => break,
            }
        }
        Ok(())
    }

    pub(super) fn drop_client(&mut self, id: ClientId) {
        self.streams.remove(&id);
        self.hub.remove_client(id);
    }

    pub(super) fn read_link(&mut self) {
        if self.link.greet(self.hub.now_ms) == News::Opened {
            self.channel_due_ms = None;
            self.hub.begin_channel();
        }
        self.read_link_once();
    }

    /// Read one buffer; return whether there was something.
    pub(super) fn read_link_once(&mut self) -> bool {
        let Some(mut stream) = self.link.stream() else { return false };
        match stream.read(&mut self.buffer) {
            Ok(0) => {
                self.lose_link();
                false
            }
            Ok(n_bytes) => {
                self.hub.guest.decoder.feed(&self.buffer[..n_bytes]);
                if let Err(broken) = self.hear_guest() {
                    self.hub.on_guest_broken(broken.0);
                    self.hub.end_channel();
                    self.link = Link::none();
                    return false;
                }
                true
            }
            Err(error) if is_passing(&error) => false,
            Err(_) => {
                self.lose_link();
                false
            }
        }
    }

    fn hear_guest(&mut self) -> Result<(), Broken> {
        while let Some(frame) = self.hub.guest.decoder.next_frame()? {
            self.hub.on_guest_frame(&frame)?;
        }
        Ok(())
    }

    pub(super) fn lose_link(&mut self) {
        self.hub.end_channel();
        if !self.link.lose(self.hub.now_ms) {
            self.channel_due_ms = Some(self.hub.now_ms + CHANNEL_GRACE_MS);
        }
    }

    pub(super) fn read_console(&mut self) -> bool {
        let Pipes::Socket(console, _) = &mut self.pipes else { return false };
        match console.read(&mut self.buffer) {
            Ok(n_bytes) if n_bytes > 0 => {
                self.hub.on_console(&self.buffer[..n_bytes], false);
                true
            }
            Err(error) if is_passing(&error) => false,
            _ => {
                self.is_console_over = true; // a socket that says so again and again is not asked any more
                false
            }
        }
    }

    pub(super) fn read_output(&mut self, index: usize) -> bool {
        let (is_console, outputs) = match &mut self.pipes {
            Pipes::Socket(_, outputs) => (false, outputs),
            Pipes::Stdio(_, outputs) => (true, outputs),
        };
        let Some(output) = &outputs[index] else { return false };
        match rustix::io::read(output, &mut self.buffer[..]) {
            Ok(0) => {
                outputs[index] = None;
                false
            }
            Ok(n_bytes) if is_console => {
                if index == 1 {
                    self.words.hear(&self.buffer[..n_bytes]);
                }
                self.hub.on_console(&self.buffer[..n_bytes], index == 1);
                true
            }
            Ok(n_bytes) => {
                self.words.write(&self.buffer[..n_bytes]);
                true
            }
            Err(_) => false,
        }
    }
}
